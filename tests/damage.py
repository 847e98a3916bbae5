"""Damage done to small real files, by seed: bytes, JSON fields, safetensors headers. Nothing here knows of tether."""

import copy
import json
import math

DEEP, HUGE = "deep", "huge"
EVIL = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63) - 1, 10**39, HUGE, 0.5, -0.0, 1e308, math.nan, math.inf,
    "", "a", "x" * 100_000, "../../x", "/etc/passwd", "C:\\x", "\\\\host\\share", "~nobody", "..", ".", "con", "a/b",
    "law\n", "\u202elaw", "\x1b[2J", "\ud800", "\0", "(a+)+$", "sha256:0", "http://localhost/x", [], {}, [[]], [0],
    [None], ["../x"], {"": None}, {"a": {"b": []}}, [1e400], [True], DEEP,
]  # fmt: skip
"""Values that no field may make anything of but an error: other types, other sizes, other places, other text."""


def damaged(kind, content, draw):
    """Give other bytes in place of a file's.

    Args:
        kind: `json`, `lines` (of JSON), `safetensors` or `text`.
        content: bytes of the file.
        draw: a `random.Random`.
    """
    if kind == "text" or draw.random() < 0.3:
        return _bytes(content, draw)
    if kind == "json":
        return _json(json.loads(content), draw)
    if kind == "lines":
        lines = content.split(b"\n")
        at = draw.randrange(len(lines) - 1)
        lines[at] = _json(json.loads(lines[at]), draw)
        return b"\n".join(lines)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = header.get("__metadata__", {})
    texts = [key for key, value in about.items() if value[:1] in "{["]
    if texts and draw.random() < 0.7:
        key = draw.choice(texts)
        # The header itself must stay UTF-8, else only the safetensors library is tried.
        about[key] = _json(json.loads(about[key]), draw).decode(errors="replace")
        text = json.dumps(header).encode()
    else:
        text = _json(header, draw)
    return len(text).to_bytes(8, "little") + text + data


def _bytes(content, draw):
    size = len(content)
    at, length = draw.randrange(size), draw.randint(1, max(1, size // 4))
    ways = [
        lambda: b"",
        lambda: content[:at],
        lambda: content[:at] + content[at + length :],
        lambda: content[:at] + content[at : at + length] + content[at:],
        lambda: content[:at] + draw.randbytes(draw.randint(1, 64)) + content[at:],
        lambda: content[:at] + bytes(length) + content[at + length :],
        lambda: draw.randbytes(size),
        lambda: _flipped(content, draw),
    ]
    return draw.choice([*ways, ways[-1], ways[-1], ways[-1]])()


def _flipped(content, draw):
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 8])):
        # Half of them at the beginning, where formats keep what they say of themselves.
        at = draw.randrange(min(len(content), 64) if draw.random() < 0.5 else len(content))
        flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _json(content, draw):
    for _ in range(draw.choice([1, 1, 1, 2])):
        places = list(_places(content))
        if not places:
            content = copy.deepcopy(draw.choice(EVIL))
            continue
        holder, key = draw.choice(places)
        way = draw.random()
        if way < 0.65:
            holder[key] = copy.deepcopy(draw.choice(EVIL))
        elif way < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(draw.choice(["unknown", "../x", "\x1b", "__class__", "__metadata__"]))] = holder[key]
        else:
            holder.extend([holder[key]] * draw.choice([1, 1000]))
    if draw.random() < 0.02:
        content = copy.deepcopy(draw.choice(EVIL))
    text = _written(content)
    if draw.random() < 0.03 and text[:1] == "{" and len(text) > 2:
        text = '{"name": "first", "name": "second", ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _written(content):
    # More digits than Python writes, and more brackets than it nests.
    text = json.dumps(content)
    return text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)


def _places(content):
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        pairs = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, value in list(pairs):
            yield holder, key
            if isinstance(value, dict | list):
                waiting.append(value)
