"""The numbers in a text: where they stand, what they are worth, and how a value is printed.

What counts as a number is decided here and nowhere else:

- Integers, decimals (`3.5`, `.5`), thousands in groups of exactly three (`1,234,567.89`; any other comma
  is punctuation) and scientific notation (`1e-5`, `1.5E+10`). `2.5×10^3` is three numbers with text between.
- `-`, `+` and U+2212 are a sign at the start of the text and after whitespace, an opening bracket, a quote,
  a currency, an operator or punctuation: `$-3` and `x=-3` hold -3. After a letter, a digit (also one with its
  unit), a closing bracket or another dash they are text: `3-5`, `5%-10%` and `A-5` hold no negative number.
- A unit of letters may be glued on (`5kg`, `3.5GB`, `5m²`); the number ends before it. Currency and percent
  stay text and scale nothing: `5%` is 5, and `-$3` is `-$` before 3.
- Text, not numbers: digits glued to a letter or underscore before them, with or without a dot (`H2O`, `v2.1`,
  `p.5`); mixtures (`4x4`, `3D7F`, `1_000`); hex (`0xFF`); ordinals (`21st`); leading zeros (`007`); exponents
  of units (`m^2`, `s^-1`); versions and addresses (`1.2.3`, `192.168.0.1:80`); times (`10:30`); three or more
  groups joined by `-`, `/` or `:` (`2024-01-05`, `05/11/2024`, `555-12-3456`); dates such as `2024年1月5日`.
- Only ASCII digits are digits. Fullwidth, Arabic-Indic, superscript and other digits are text, and so is
  what they are glued to. Scripts written without spaces (Chinese, Japanese, Korean, Thai) do not glue:
  `价格5元` holds 5.
- nan and inf are words. So is a number beyond `LIMIT`: its digits stay as they are written, and nothing is lost.
"""

import math
import re
from typing import NamedTuple

from tether.errors import ConfigError

__all__ = ["LIMIT", "Numeral", "find_numbers", "format_number"]

LIMIT = 1e30
"""Largest size of a number: what is larger in a text is text, and no larger value is generated."""

_MINUS = "\u2212"


class Numeral(NamedTuple):
    """One number in a text: `text[start:end] == surface`, sign included, unit excluded."""

    start: int
    end: int
    value: float
    surface: str


# Letters of scripts without spaces between words: kana, ideographs, Hangul, Thai (its digits excluded).
_UNSPACED = r"\u0e01-\u0e4e\u1100-\u11ff\u3040-\u318f\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_UNSPACED += r"\U00020000-\U0003ffff"
_WORD = rf"[^\W{_UNSPACED}]"
_LETTER = rf"[^\W\d_{_UNSPACED}]"
_GROUP = rf"[0-9]{_WORD}*+"

# Every repetition is possessive and every alternative either consumes what it has looked at or has looked at
# no more than three groups, so that the scan is linear on any text.
_CANDIDATE = re.compile(
    rf"""
    (?<!{_WORD}) (?<!{_WORD}\.) (?<!{_LETTER}\^) (?<!{_LETTER}\^[-+{_MINUS}])
    (?:
      (?P<code>
        (?:[0-9]{{2,4}}年)?[0-9]{{1,2}}月[0-9]{{1,2}}[日号] | [0-9]{{2,4}}年[0-9]{{1,2}}月  # 2024年1月5日
      | {_GROUP}(?:[-/]{_GROUP}){{2,}}+(?:[-+:./]{_GROUP})*+                      # dates, phones, ISO stamps
      | {_GROUP}(?::{_GROUP}){{2,}}+(?:\.{_GROUP})*+                              # 10:30:15
      | [0-9]{{1,2}}:[0-5][0-9](?![0-9]){_WORD}*+(?:[.:]{_GROUP})*+               # 10:30
      | (?<!\.)\.[0-9]++(?:\.{_GROUP})++                                          # .1.2
      | [0-9]++(?:\.{_GROUP}){{2,}}+(?:[-:/]{_GROUP})*+                           # 1.2.3, 192.168.0.1:80
      )
    | (?P<whole>(?<!\.)(?=\.[0-9]) | [0-9]++(?P<more>(?:,[0-9]++)*+))
      (?P<rest>(?:\.[0-9]++)?+(?:[eE](?:[-+{_MINUS}][0-9]++|[0-9]{{1,3}}(?![0-9])))?+)
      (?P<glued>{_WORD}*+)
    )
    """,
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})++")
_LEADING_ZERO = re.compile(r"0[0-9]")
_HEX = re.compile(r"[xX][0-9a-fA-F]+")
_SIGN = re.compile(rf"(?<![\w)\]}}%‰°+\-{_MINUS}–—.])(?<!\w['\"’”€$£¥²³])[-+{_MINUS}]")


def _is_unit(whole: str, glued: str) -> bool:
    if not glued:
        return True
    if glued.lower() in {"st", "nd", "rd", "th"} or (whole == "0" and _HEX.fullmatch(glued)):
        return False
    return glued.rstrip("²³").isalpha()


# The number at a place where one is written, or nothing where its size is beyond `LIMIT`.
def _numeral(text: str, start: int, end: int) -> list[Numeral]:
    if start and _SIGN.match(text, start - 1):
        start -= 1
    surface = text[start:end]
    value = float(surface.replace(",", "").replace(_MINUS, "-"))
    return [Numeral(start, end, value, surface)] if abs(value) <= LIMIT else []


def find_numbers(text: str) -> list[Numeral]:
    """Find the numbers of a text, by the rules at the top of this module.

    The time is linear in the length of the text, whatever the text is.

    Args:
        text: any text.

    Returns:
        The numbers in the order of the text, not overlapping. Values below the smallest float64 are 0.

    Example:
        >>> [number.value for number in find_numbers("From -3.5 to 1,200kg, 10-20% since 2024-01-05.")]
        [-3.5, 1200.0, 10.0, 20.0]
    """
    found: list[Numeral] = []
    position = 0
    while match := _CANDIDATE.search(text, position):
        position = match.end()
        if match["code"] is not None:
            continue
        start, whole = match.start(), match["whole"]
        if match["more"] and not _THOUSANDS.fullmatch(whole):
            # A list: all but its last item are complete; the last is looked at again, with what follows it.
            for item in whole.split(",")[:-1]:
                if not _LEADING_ZERO.match(item):
                    found += _numeral(text, start, start + len(item))
                start += len(item) + 1
            position = start
        elif _is_unit(whole + match["rest"], match["glued"]) and not _LEADING_ZERO.match(whole):
            found += _numeral(text, start, match.start("glued"))
    return found


def format_number(value: float, *, precision: int | None = None) -> str:
    """Print a number as the shortest text that reads back as the same float64.

    Integers have no point, and sizes from 1e-4 to below 1e16 no exponent. -0.0 is printed as 0.

    Args:
        value: finite, |value| <= `LIMIT`.
        precision: significant digits to round to first, >= 1; None keeps all.

    Returns:
        A text that `find_numbers` takes for one number with this value.

    Raises:
        ConfigError: value is nan, infinite or beyond `LIMIT`, or precision is below 1.

    Example:
        >>> format_number(1234567.0), format_number(-1.5e-7), format_number(2 / 3, precision=3)
        ('1234567', '-1.5e-7', '0.667')
    """
    value = float(value)
    if not math.isfinite(value) or abs(value) > LIMIT:
        raise ConfigError(
            f"value {value}: expected a finite number of at most {LIMIT:g} in size; check what produced it"
        )
    if precision is not None:
        if precision < 1:
            raise ConfigError(
                f"precision={precision}: expected at least 1 significant digit, or None for all"
            )
        value = float(f"{value:.{precision}g}")
    digits, _, exponent = repr(value + 0.0).partition("e")
    digits = digits.removesuffix(".0")
    return f"{digits}e{int(exponent)}" if exponent else digits
