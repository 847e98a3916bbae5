"""Documents that are more than their letters: of some only a part is learnt, of some control tokens count.

A text, a prompt and what a turn says are letters, even where they look like a control token of the model: a text about
a chat format must not be read as a chat. Whoever wants them read as such asks for it, and has `Controlled` documents.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from tether.errors import ConfigError

__all__ = ["KINDS", "Controlled", "Marked", "Part", "as_letters", "controlled", "document_of", "kind_of"]

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
        return as_letters(tokenizer, self.text) if self.plain else {}


def as_letters(tokenizer: Any, text: str) -> dict[str, bool]:
    """Keep control tokens from being read in a text.

    Args:
        tokenizer: whose control tokens: all of its special tokens.
        text: the text.

    Returns:
        Options of a call of the tokenizer; none where there is nothing to keep from it.
    """
    known = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {token.content for token in known if token.special}
    names.update(getattr(tokenizer, "all_special_tokens", ()))
    return {"split_special_tokens": True} if any(name in text for name in names) else {}


class Controlled(str):
    """A text in which control tokens are read as such."""

    __slots__ = ()


class Marked(str):
    """A prompt with its completion, or a conversation, of which the completion or the assistant's turns are learnt.

    As a string it is its row as JSON with sorted keys, so that it is hashed, compared and kept like any document.

    Attributes:
        control: whether control tokens are read as such in what prompts, completions and turns say.
    """

    control: bool = False

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
        row, plain = json.loads(self), not self.control
        if "prompt" in row:
            # A completion that brings the end token is closed by it, and not by a second one.
            end = getattr(tokenizer, "eos_token", None) or ""
            said = row["completion"].removesuffix(end)
            parts = [Part(row["prompt"], learnt=False, plain=plain), Part(said, learnt=True, plain=plain)]
            return [*parts, Part(end, learnt=True)] if end else parts
        parts = _turns(row["messages"], tokenizer)
        return parts if plain else [part._replace(plain=False) for part in parts]

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


def controlled(document: str) -> str:
    """Ask for control tokens to be read as such in a document.

    Args:
        document: a text or a `Marked`.

    Returns:
        The same letters, as a `Controlled` or a `Marked` that says so.
    """
    if not isinstance(document, Marked):
        return Controlled(document)
    asked = Marked(document)
    asked.control = True
    return asked


def kind_of(row: Any, field: str | None = None) -> str | None:
    """Tell what a row of data is.

    Args:
        row: anything.
        field: where the text or the conversation is, if it is not in `text` or `messages`.

    Returns:
        One of `KINDS`, or None.
    """
    if not isinstance(row, Mapping):
        return None
    if field is not None:
        return None if field not in row else "messages" if isinstance(row[field], list) else "text"
    return next((kind for kind in KINDS if kind in row), None)


def document_of(row: Any, kind: str, field: str | None = None) -> str:
    """Take the document out of a row; other fields are passed over.

    Args:
        row: one with the fields of its kind.
        kind: one of `KINDS`.
        field: as for `kind_of`.

    Returns:
        The text, or a `Marked`.

    Raises:
        ConfigError: the row has not these fields, or something else in them.
    """
    name = field or kind
    try:
        if kind == "text":
            return _text(row[name])
        if kind == "prompt":
            kept = {name: _text(row[name]) for name in ("prompt", "completion")}
            if not kept["completion"].strip():
                raise ConfigError("the completion is empty; nothing is to be learnt from it")
            return Marked(json.dumps(kept, sort_keys=True, ensure_ascii=False))
        turns = [{name: _text(turn[name]) for name in ("role", "content")} for turn in row[name]]
    except (KeyError, TypeError, UnicodeEncodeError) as error:
        expected = {
            "text": f'a text "{name}"', "prompt": 'texts "prompt" and "completion"',
            "messages": f'"{name}", a list of turns with texts "role" and "content"',
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
