import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tether.causal.numerals import LIMIT, Numeral, find_numbers, format_number
from tether.errors import ConfigError

TEXTS = {
    # integers, decimals, scientific
    "0 and 42": ["0", "42"],
    "3.5 and .5, 0.5": ["3.5", ".5", "0.5"],
    "It is 3.": ["3"],
    "pi=3.14.": ["3.14"],
    "1e-5 1.5E+10 2E3 1e\u22125": ["1e-5", "1.5E+10", "2E3", "1e\u22125"],
    "2.5×10^3": ["2.5", "10", "3"],
    "1...5": ["1", "5"],
    # thousands
    "1,234,567.89": ["1,234,567.89"],
    "1,234kg of 12,345": ["1,234", "12,345"],
    "12,34 and 1,2345": ["12", "34", "1", "2345"],
    "[120,340,5]": ["120", "340", "5"],
    "0,123 1, 2,3": ["0", "123", "1", "2", "3"],
    "1,234,5.5": ["1", "234", "5.5"],
    "1,200e3": ["1,200e3"],
    "1,2,10:30 1,2,2024-01-05": ["1", "2", "1", "2"],
    # signs
    "-5 +3 \u22122": ["-5", "+3", "\u22122"],
    "(-5) [-5] '-5' x=-5 a:-5 1,-5 2*-5": ["-5", "-5", "-5", "-5", "-5", "1", "-5", "2", "-5"],
    "3-5 10-20 A-5 a)-5 x_-5": ["3", "5", "10", "20", "5", "5", "5"],
    "5%-10% 5kg-10kg 5€-6€ 5'-6'": ["5", "10", "5", "10", "5", "6", "5", "6"],
    "--5 a--5 +-5 3 - 5 3 -5": ["5", "5", "5", "3", "5", "3", "-5"],
    "$3.50 -$3 $-3": ["3.50", "3", "-3"],
    "10^-5": ["10", "-5"],
    # units and punctuation
    "5kg 3.5GB 25°C 5% 5m² 7km/h 1080p": ["5", "3.5", "25", "5", "5", "7", "1080"],
    "(42)!": ["42"],
    "#5, 24/7, 16:9, 3:1": ["5", "24", "7", "16", "9", "3", "1"],
    "1e5kg 5e 2em": ["1e5", "5", "2"],
    "http://a.b/12?c=-3": ["12", "-3"],
    # scripts without spaces
    "价格5元,共12个": ["5", "12"],
    "3月 2024年": ["3", "2024"],
}
UNCHANGED = (
    *("", "no numbers", "H2O GPT4 v2.1 x86 B12 p.5 No.7 a_1 ITER_2", "1.2.3 192.168.0.1 .1.2 1.2.3rc1"),
    *(
        "192.168.0.1:8080 10.0.0.0/24",
        "2024-01-05 05/11/2024 2024/1/5 2024-01-05T10:30:00.5+02:00Z",
    ),
    *(
        "10:30 10:30:15 9:05am 10:30-11:45",
        "0x1F 0xFF 0b101 1st 22nd 3rd 4TH 007 00 -007 00.5",
        "4x4 3D7F 1_000 12ab3",
    ),
    *("+1-800-555-0199 978-3-16-148410-0 555-12-3456", "m^2 m/s^2 s^-1", "nan inf -inf NaN infinity"),
    *("５ ٣ ४ x² 5² 5٣ ٣5 ½ 5½ ①", "2024年1月5日 1月5日 24年12月", "550e8400-e29b x", "..."),
)


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_of_a_text(text):
    found = find_numbers(text)
    assert [number.surface for number in found] == TEXTS[text]
    for number in found:
        assert text[number.start : number.end] == number.surface
        assert number.value == float(number.surface.replace(",", "").replace("\u2212", "-"))


@pytest.mark.parametrize("text", UNCHANGED)
def test_texts_without_numbers(text):
    assert find_numbers(text) == []


def test_offsets_and_values():
    assert find_numbers("a -1,500.5x") == [Numeral(2, 10, -1500.5, "-1,500.5")]
    assert find_numbers("1e-400")[0].value == 0.0
    assert find_numbers("9007199254740993")[0].value == 9007199254740992.0


@pytest.mark.parametrize("number", ["1e400", "-1.5e31", "1" + "0" * 31, "9" * 1000, "1" + ",000" * 11])
def test_too_large_a_number_is_text_and_its_neighbours_stay_numbers(number):
    assert [found.value for found in find_numbers(f"3 abc {number} x -4.5")] == [3, -4.5]
    assert [found.value for found in find_numbers(f"3,{number.replace(',', '')},7")] == [3, 7]


def test_the_limit_itself_is_a_number():
    assert [number.value for number in find_numbers("1e30 -1e30 1" + "0" * 30)] == [LIMIT, -LIMIT, LIMIT]


@pytest.mark.parametrize(
    "unit",
    [
        "1,",
        "1,234,",
        "1.",
        ".",
        ",",
        "1-",
        "1:",
        "12:",
        "1/",
        "1-2a",
        "4x",
        "1e1,",
        "1年",
        "1,2.",
        "9.9-",
        "10:30.",
        "1²",
    ],
)
@pytest.mark.parametrize("tail", ["", "a1_", "x"])
def test_time_is_linear_on_hostile_text(unit, tail):
    text = unit * (1_000_000 // len(unit)) + tail
    start = time.process_time()
    find_numbers(text)
    # A quadratic scan would take hours; a linear one takes about a second.
    assert time.process_time() - start < 20


def test_a_million_digits_are_text_at_once():
    start = time.process_time()
    assert find_numbers("7" * 1_000_000) == []
    assert find_numbers("0." + "1" * 1_000_000)[0].value == 1 / 9
    assert time.process_time() - start < 5


@given(st.floats(-LIMIT, LIMIT))
@example(5e-324)
@example(1e16)
@example(1e22)
@example(-1e30)
@example(2**53 + 2.0)
@example(1e-5)
def test_what_is_printed_reads_back(value):
    text = format_number(value)
    assert find_numbers(text) == [Numeral(0, len(text), value, text)]
    assert len(text) <= len(repr(value))


@given(st.floats(-LIMIT, LIMIT), st.integers(1, 20))
def test_rounding_to_significant_digits(value, precision):
    text = format_number(value, precision=precision)
    assert find_numbers(text)[0].value == float(f"{value:.{precision}g}")


@settings(max_examples=300)
@given(st.text(st.sampled_from("0123456789,.-+:/eExk %$^_a(年月²\u2212"), max_size=60))
def test_any_mixture_gives_ordered_numbers_with_their_values(text):
    try:
        found = find_numbers(text)
    except ConfigError:
        return
    end = 0
    for number in found:
        assert number.start >= end
        end = number.end
        assert text[number.start : number.end] == number.surface
        assert number.value == float(number.surface.replace(",", "").replace("\u2212", "-"))
        assert abs(number.value) <= LIMIT
        before, after = text[number.start - 1 : number.start], text[number.end : number.end + 1]
        assert not (before.isascii() and (before.isalnum() or before == "_"))
        assert not after.isdigit()


def test_printed_forms():
    printed = {
        0.0: "0",
        3.0: "3",
        1e15: "1000000000000000",
        1e16: "1e16",
        0.0001: "0.0001",
        1e-5: "1e-5",
    }
    assert {value: format_number(value) for value in printed} == printed
    assert format_number(-0.0) == "0"
    assert format_number(1234.5678, precision=2) == "1200"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.1e30])
def test_unprintable_values(value):
    with pytest.raises(ConfigError, match="expected a finite number"):
        format_number(value)


def test_no_digits_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="at least 1"):
        format_number(1.0, precision=0)
