"""The one way in for JSON and YAML: sizes, depth, numbers and text are bounded, and fields are those of a schema."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tether.errors import CheckpointError, TetherError
from tether.files import read_bytes
from tether.names import check_name

__all__ = [
    "DEEPEST",
    "JSON_BYTES",
    "YAML_BYTES",
    "Name",
    "Strict",
    "checked",
    "finite",
    "parse_as",
    "parse_json",
    "read_json",
    "read_yaml",
]

JSON_BYTES: Final = 16 * 2**20
"""Size of a JSON file at most."""
YAML_BYTES: Final = 256 * 2**10
"""Size of a YAML file at most: it is read a hundred times slower."""
DEEPEST: Final = 32
"""Lists and objects inside each other at most."""
_DIGITS: Final = 40
"""Characters of a whole number at most, before it is made one."""
_WHOLE: Final = 2**64
"""Whole numbers are smaller than this, in size."""
_HOLDERS: Final = (dict, list, tuple)

Name = Annotated[str, AfterValidator(check_name)]
"""The name of a domain, as a field of a schema."""

_S = TypeVar("_S", bound=BaseModel)


class Strict(BaseModel):
    """Base of the schemas: no unknown fields, no number for a text or the other way round, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_json(path: str | Path, *, error: type[TetherError] = CheckpointError) -> Any:
    """Read a JSON file.

    Args:
        path: the file, of at most `JSON_BYTES`.
        error: what to raise.

    Returns:
        What it says, as of `parse_json`.

    Raises:
        TetherError: of the type given, if it cannot be read, or is none that `parse_json` takes.
    """  # noqa: DOC502 - raised by what it calls
    return parse_json(read_bytes(path, JSON_BYTES, error=error), path, error=error)


def parse_json(
    text: str | bytes, where: str | Path, *, foreign: bool = False, error: type[TetherError] = CheckpointError
) -> Any:
    """Parse JSON as its standard has it: no NaN, no field twice; and within bounds.

    Args:
        text: JSON, bytes in UTF-8.
        where: what to call it in an error.
        foreign: whether NaN, infinity and any text pass, as in what Python's json writes: configs and tokenizers of
            transformers, figures of a run.
        error: what to raise.

    Returns:
        Dicts, lists, text that UTF-8 can hold, finite numbers, booleans and None.

    Raises:
        TetherError: of the type given, if it is damaged, deeper than `DEEPEST`, or holds numbers or text out of bounds.

    Example:
        >>> parse_json('{"nats": 0.05}', "leash.json")
        {'nats': 0.05}
    """  # noqa: DOC502 - `error` is raised
    try:
        content = json.loads(
            text.decode("utf-8-sig") if isinstance(text, bytes) else text,
            parse_constant=None if foreign else _no_number, parse_int=_whole, object_pairs_hook=_once,
        )  # fmt: skip
    except RecursionError as deep:
        raise error(f"{where}: lists and objects deeper than {DEEPEST}; take another copy") from deep
    except ValueError as broken:
        raise error(f"{where}: expected JSON ({broken}); take another copy") from broken
    _check(content, where, error, foreign)
    return content


def read_yaml(path: str | Path, *, error: type[TetherError] = CheckpointError) -> Any:
    """Read a YAML file without aliases and tags, within the bounds of `parse_json`.

    Args:
        path: the file, of at most `YAML_BYTES`.
        error: what to raise.

    Returns:
        As of `parse_json`.

    Raises:
        TetherError: of the type given, if it cannot be read, is no such YAML, or is out of bounds.
    """  # noqa: DOC502 - raised by what it calls
    text = read_bytes(path, YAML_BYTES, error=error)
    try:
        content = yaml.load(text.decode("utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as broken:
        said = " ".join(str(broken).split()) or type(broken).__name__
        raise error(
            f"{path}: expected YAML of at most {DEEPEST} levels, without aliases ({said})"
        ) from broken
    _check(content, path, error, False)
    return content


def checked(
    schema: type[_S], content: Any, where: str | Path, *, error: type[TetherError] = CheckpointError
) -> _S:
    """Check content against the bounds of `parse_json` and its schema.

    Args:
        schema: the fields it must have.
        content: what a parser gave.
        where: what to call it in an error.
        error: what to raise.

    Returns:
        The content as fields.

    Raises:
        TetherError: of the type given; the message names every field that is missing, unknown or wrong.
    """  # noqa: DOC502 - raised by what it calls
    _check(content, where, error, False)
    return _fields(schema, content, where, error)


def parse_as(
    schema: type[_S],
    text: str | bytes,
    where: str | Path,
    *,
    foreign: bool = False,
    error: type[TetherError] = CheckpointError,
) -> _S:
    """Parse JSON and check it against its schema: `parse_json` and `checked` in one.

    Args:
        schema: the fields it must have.
        text: JSON, bytes in UTF-8.
        where: what to call it in an error.
        foreign: as of `parse_json`, for fields of any type.
        error: what to raise.

    Returns:
        The content as fields.
    """
    return _fields(schema, parse_json(text, where, foreign=foreign, error=error), where, error)


def _fields(schema: type[_S], content: Any, where: str | Path, error: type[TetherError]) -> _S:
    try:
        return schema.model_validate(content)
    except ValidationError as wrong:
        fields = "; ".join(
            f"{_name(item['loc']) or 'all of it'}: {item['msg'].removeprefix('Value error, ')}"
            for item in wrong.errors(include_url=False)[:8]
        )
        raise error(f"{where}: {fields}; take another copy, or make it again") from wrong


def finite(content: Any) -> Any:
    """Make of content what JSON can hold: None stands for NaN and infinity, which JSON does not have.

    Args:
        content: dicts, lists and tuples of numbers, text and None.

    Returns:
        The same with lists for tuples.

    Example:
        >>> finite({"low": float("nan"), "mean": (1, 2.5)})
        {'low': None, 'mean': [1, 2.5]}
    """
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class _Loader(yaml.SafeLoader):
    """Plain YAML: aliases, which multiply, are refused, and so are numbers that take long to make."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) stands for another place: write it out")
        self.depth += 1
        if self.depth > DEEPEST + 1:
            raise yaml.YAMLError(f"lists and objects deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [ascii(key) for key, count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"{', '.join(twice[:8])}: expected each field once")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _DIGITS:
            raise yaml.YAMLError(f"a whole number of {len(node.value)} characters")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


# Goes through everything without recursion; the parser has bounded what can be here only roughly. Places are chains of
# the holder's place and the key in it, since most of them are never named.
def _check(content: Any, where: str | Path, error: type[TetherError], foreign: bool) -> None:
    waiting: list[tuple[Any, Any, int]] = [(content, None, 0)]
    while waiting:
        value, at, depth = waiting.pop()
        if isinstance(value, _HOLDERS):
            if depth >= DEEPEST:
                raise error(f"{where}: {_name(_path(at)[:4])}...: lists and objects deeper than {DEEPEST}")
            keyed = isinstance(value, dict)
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if keyed and (not isinstance(key, str) or (not foreign and _wrong(key))):
                    raise error(
                        f"{where}: {_name(_path(at)) or 'all of it'}: a field's name is {ascii(key)[:80]}; expected "
                        "plain text"
                    )
                # Most of a header or an index is plain text and numbers: what is good costs no more than this look.
                if inner.__class__ is str and inner.isascii() and "\0" not in inner:
                    continue
                if inner.__class__ is int and -_WHOLE < inner < _WHOLE:
                    continue
                waiting.append((inner, (at, key), depth + 1))
        elif not foreign and (wrong := _wrong(value)):
            raise error(f"{where}: {_name(_path(at)) or 'all of it'}: {wrong}")


def _path(at: Any) -> tuple[Any, ...]:
    keys = []
    while at:
        at, key = at
        keys.append(key)
    return tuple(reversed(keys))


def _wrong(value: Any) -> str | None:
    if isinstance(value, str):
        # Half a character cannot be written again, and a zero byte ends a path early.
        half = not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
        return "text with half a character or a zero byte" if half or "\0" in value else None
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if abs(value) < _WHOLE else "a whole number of more than 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is no finite number"
    return f"a {type(value).__name__}; expected text, a number, true, false or null"


def _name(at: tuple[Any, ...]) -> str:
    return ".".join(part if str(part).isidentifier() else ascii(part) for part in map(_short, at))


def _short(part: Any) -> Any:
    return part if isinstance(part, int) or len(part) <= 64 else part[:64] + "..."
