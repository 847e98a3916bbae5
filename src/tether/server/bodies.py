"""Bodies of requests, checked field by field: what is not supported is refused by name, not passed over."""

from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from tether.server.refusal import Refused

__all__ = ["ChatBody", "CompletionBody", "read_body"]

SEEDS: Final = 2**63 - 1
"""The largest seed of torch's generators."""
COLDEST: Final = 1e-3
HOTTEST: Final = 100.0
"""Temperatures that are not 0: beyond them scores overflow, or all tokens are alike."""
STOPS: Final = 4
"""Texts to stop at, at most, as OpenAI has it."""

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "logit_bias": ({},), "parallel_tool_calls": (True, False), "store": (False,),
    "tools": ([],), "suffix": ("",), "response_format": ({"type": "text"},), "top_logprobs": (0,),
}  # fmt: skip
"""Fields of OpenAI's interface that are not supported, with the values that ask for nothing; clients send them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What comes at the end of a stream; it always says how many tokens there were."""

    include_usage: bool = True


class Piece(_Strict):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class Turn(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Piece]

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else " ".join(each.text for each in self.content)


class _Body(_Strict):
    """Fields of both kinds of requests.

    Attributes:
        model: name of one that is served.
        max_tokens: new tokens at most.
        temperature: 0 is greedy; None takes the model's own way of writing.
        top_p: of sampling, in (0, 1].
        seed: of sampling, or of the individual in mode `causal`; None draws one.
        stop: texts that end the answer and are not part of it.
        stream: whether to answer piece by piece.
        tether: whether the answer says who spoke; see `tether.server.told`.
        user: whoever asks; nothing is done with it.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=SEEDS)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tether: bool = False
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _can_be_divided_by(cls, given: float | None) -> float | None:
        if given and not COLDEST <= given <= HOTTEST:
            raise PydanticCustomError(
                "temperature", f"expected 0, or a number from {COLDEST:g} to {HOTTEST:g}"
            )
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts to stop at.

        Raises:
            Refused: too many, or an empty one.
        """
        given = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(given) > STOPS or not all(given):
            raise Refused(f"stop: expected at most {STOPS} texts, none of them empty", field="stop")
        return given

    @property
    def limit(self) -> int | None:
        """New tokens at most, as far as the request says."""
        return self.max_tokens


class CompletionBody(_Body):
    """A request to go on from a text."""

    prompt: str


class ChatBody(_Body):
    """A request for the next turn of a conversation."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """New tokens at most, as far as the request says; the newer of the two names counts."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


_B = TypeVar("_B", bound=_Body)


def read_body(kind: type[_B], body: dict[str, Any]) -> _B:
    """Check a body.

    Args:
        kind: what it should be.
        body: as JSON gave it.

    Returns:
        The body, with texts that can be written as UTF-8 only.

    Raises:
        Refused: a field is missing, wrong, unknown or not supported; it is named.
    """
    given = {
        name: value for name, value in body.items() if value is not None and not _asks_nothing(name, value)
    }
    if isinstance(turns := given.get("messages"), list):
        # Clients send back what they were sent, empty fields included.
        given["messages"] = [
            {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else turn
            for turn in turns
        ]
    try:
        found = kind.model_validate(given)
        found.model_dump_json().encode()
    except ValidationError as error:
        raise Refused(*_said(error)) from None
    except ValueError:  # half a character, of which pydantic cannot make JSON
        raise Refused("the body holds half a character (a lone surrogate): expected whole ones") from None
    return found


def _asks_nothing(name: str, value: Any) -> bool:
    return any(value == each and type(value) in (type(each), float) for each in NEUTRAL.get(name, ()))


def _said(error: ValidationError) -> tuple[str, int, str]:
    # What it asked for beyond what there is comes first: it tells most.
    first = min(
        error.errors(include_url=False, include_input=False),
        key=lambda each: each["type"] != "extra_forbidden",
    )
    # Of alternatives pydantic adds the kind to the place.
    kinds = {"str", "Piece", "list[str]", "list[Piece]"}
    where = [str(each) for each in first["loc"] if each not in kinds]
    field = ascii(".".join(where) or "body")[1:-1][:80]
    if first["type"] == "extra_forbidden":
        return f"{field}: not supported here; leave it out", 400, field
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}", 400, field
