"""Documents of which only a part is learnt: prompts with completions, and conversations."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from tether.errors import ConfigError

__all__ = ["KINDS", "Marked", "Part", "document_of", "kind_of"]

KINDS: Final = ("text", "prompt", "messages")
"""Fields by which a row is known: a text, a prompt with its completion, a conversation."""
ROLES: Final = ("system", "developer", "user", "assistant")


class Part(NamedTuple):
    """A piece of a document.

    Attributes:
        text: the piece.
        learnt: whether its tokens are learnt, and scored.
        plain: whether control tokens in it are text, as in what a user has typed.
    """

    text: str
    learnt: bool
    plain: bool = False

    def options(self, tokenizer: Any) -> dict[str, bool]:
        """Keep control tokens from being read in what somebody has typed.

        Args:
            tokenizer: whose control tokens.

        Returns:
            Options of a call of the tokenizer; none where there is nothing to keep.
        """
        typed = self.plain and any(
            token in self.text for token in getattr(tokenizer, "all_special_tokens", ())
        )
        return {"split_special_tokens": True} if typed else {}


class Marked(str):
    """A prompt with its completion, or a conversation, of which the completion or the assistant's turns are learnt.

    As a string it is its row as JSON with sorted keys, so that it is hashed, compared and kept like any document.
    """

    __slots__ = ()

    def parts(self, tokenizer: Any) -> list[Part]:
        """Write the document as a model reads it, piece by piece.

        Args:
            tokenizer: whose chat template puts a conversation into words.

        Returns:
            The pieces in order.

        Raises:
            ConfigError: a conversation, and the tokenizer has no chat template, or one that does not write the turns
                one after the other as they are.
        """  # noqa: DOC502 - raised by _turns
        row = json.loads(self)
        if "prompt" in row:
            end = getattr(tokenizer, "eos_token", None)
            closed = (
                row["completion"] if not end or row["completion"].endswith(end) else row["completion"] + end
            )
            return [Part(row["prompt"], learnt=False), Part(closed, learnt=True)]
        return _turns(row["messages"], tokenizer)

    @property
    def is_conversation(self) -> bool:
        """Whether a chat template writes it, with whatever begins a text."""
        return "messages" in json.loads(self)

    def spelt(self, tokenizer: Any) -> str:
        """Write the document as one text.

        Args:
            tokenizer: as for `parts`.

        Returns:
            The text.
        """
        return "".join(part.text for part in self.parts(tokenizer))


def kind_of(row: Any) -> str | None:
    """Tell what a row of data is.

    Args:
        row: anything.

    Returns:
        One of `KINDS`, or None.
    """
    return next((kind for kind in KINDS if kind in row), None) if isinstance(row, Mapping) else None


def document_of(row: Any, kind: str) -> str:
    """Take the document out of a row; other fields are passed over.

    Args:
        row: one with the fields of its kind.
        kind: one of `KINDS`.

    Returns:
        The text, or a `Marked`.

    Raises:
        ConfigError: the row has not these fields, or something else in them.
    """
    try:
        if kind == "text":
            return _text(row["text"])
        if kind == "prompt":
            kept = {name: _text(row[name]) for name in ("prompt", "completion")}
            if not kept["completion"].strip():
                raise ConfigError("the completion is empty; nothing is to be learnt from it")
            return Marked(json.dumps(kept, sort_keys=True, ensure_ascii=False))
        turns = [{name: _text(turn[name]) for name in ("role", "content")} for turn in row["messages"]]
    except (KeyError, TypeError, UnicodeEncodeError) as error:
        expected = {
            "text": 'a text "text"', "prompt": 'texts "prompt" and "completion"',
            "messages": '"messages", a list of turns with texts "role" and "content"',
        }[kind]  # fmt: skip
        raise ConfigError(f"expected {expected}") from error
    if other := sorted({turn["role"] for turn in turns} - set(ROLES)):
        raise ConfigError(f"a turn of role {', '.join(map(ascii, other))}; expected {', '.join(ROLES)}")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ConfigError("no turn of the assistant; nothing is to be learnt from it")
    return Marked(json.dumps({"messages": turns}, sort_keys=True, ensure_ascii=False))


# Half a character (a lone surrogate) is no text, and a number is none either.
def _text(value: Any) -> str:
    text: str = "" + value
    text.encode()
    return text


# What the template writes around the turns holds control tokens; what the turns say holds none, whatever it looks like.
def _turns(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Part]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "a conversation needs the chat template of the base's tokenizer, and it has none; give prompts and "
            "completions, or take a base that was trained on conversations"
        )
    stands = [f"turn-{number}-of-{len(messages)}" for number in range(len(messages))]
    while any(stand in message["content"] for message in messages for stand in stands):
        stands = [f"{stand}-" for stand in stands]
    around = [{**message, "content": stand} for message, stand in zip(messages, stands, strict=True)]
    try:
        written = [
            str(tokenizer.apply_chat_template(around[:count], tokenize=False))
            for count in range(1, len(around) + 1)
        ]
    except Exception as error:
        # Templates are programs, and say in many ways that they do not take these turns.
        raise ConfigError(
            f"the tokenizer's chat template does not take this conversation ({str(error).splitlines()[0][:160]})"
        ) from error
    whole = written[-1]
    if any(whole.count(stand) != 1 for stand in stands) or not all(
        after.startswith(before) for before, after in pairwise(written)
    ):
        raise ConfigError(
            "the tokenizer's chat template does not write the turns of a conversation one after the other; give "
            "prompts and completions"
        )
    parts, at = [], 0
    for message, stand, until in zip(messages, stands, map(len, written), strict=True):
        begin, learnt = whole.index(stand), message["role"] == "assistant"
        end = begin + len(stand)
        # The turn's end is learnt with it, for the model has to stop; blanks after it are not its own.
        close = max(end, len(whole[:until].rstrip())) if learnt else end
        parts += [
            Part(whole[at:begin], learnt=False), Part(message["content"], learnt, plain=True),
            Part(whole[end:close], learnt),
        ]  # fmt: skip
        at = close
    return [part for part in [*parts, Part(whole[at:], learnt=False)] if part.text]
