"""What a request brings -> the tokens that a model goes on from."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tether.causal.encoded import encode
from tether.causal.encoding import VALUES
from tether.server.bodies import ChatBody, CompletionBody, Turn
from tether.server.models import Served
from tether.server.refusal import Refused
from tether.store.marked import Controlled, Marked, Part

__all__ = ["Asked", "prompt_of"]

LETTERS = 64
"""Characters for each token of the window beyond which a prompt is not tokenised, since it cannot fit."""


class Asked(Marked):
    """A conversation up to the turn that is asked for.

    It is tokenised as those are that a delta has learnt from: control tokens are what the chat template writes; what a
    turn says is letters, whatever it looks like, so that nobody can end his own turn and speak as somebody else.
    """

    def parts(self, tokenizer: Any) -> list[Part]:
        """Write the conversation piece by piece, with the beginning of the next turn.

        Args:
            tokenizer: whose chat template puts it into words.

        Returns:
            The pieces in order.

        Raises:
            Refused: no chat template, or it does not take these turns, or not as they are.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(
                "messages: this model has no chat template; send its text as a prompt to /v1/completions",
                field="messages",
            )
        turns = json.loads(self)["messages"]
        stands = [f"turn-{number}-of-{len(turns)}" for number in range(len(turns))]
        while any(stand in turn["content"] for turn in turns for stand in stands):
            stands = [f"{stand}-" for stand in stands]
        around = [{**turn, "content": stand} for turn, stand in zip(turns, stands, strict=True)]
        try:
            written = str(tokenizer.apply_chat_template(around, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            # Templates are programs, and say in many ways that they do not take these turns.
            said = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise Refused(
                f"messages: the chat template does not take these turns ({said})", field="messages"
            ) from error
        places = [written.find(stand) for stand in stands]
        if any(written.count(stand) != 1 for stand in stands) or places != sorted(places):
            raise Refused(
                "messages: the chat template does not write these turns one after the other", field="messages"
            )
        parts, at = [], 0
        for turn, stand, place in zip(turns, stands, places, strict=True):
            parts += [Part(written[at:place], learnt=False), Part(turn["content"], learnt=False, plain=True)]
            at = place + len(stand)
        return [part for part in [*parts, Part(written[at:], learnt=False)] if part.text]


def prompt_of(body: ChatBody | CompletionBody, served: Served) -> dict[str, Tensor]:
    """Tokenise what a request brings.

    Args:
        body: of the request. Control tokens in a `prompt` are read as such, as `tether generate` reads them.
        served: the model.

    Returns:
        `input_ids` and `attention_mask`, shape (1, P), and `numeric_values` where the model reads numbers.

    Raises:
        Refused: no token, or more than the model's window holds.
    """
    field = "prompt" if isinstance(body, CompletionBody) else "messages"
    said = [body.prompt] if isinstance(body, CompletionBody) else [turn.text for turn in body.messages]
    letters = sum(map(len, said))
    if served.window is not None and letters > LETTERS * served.window:
        raise Refused(
            f"{field}: {letters:,} characters are more than this model's window of {served.window:,} tokens can hold; "
            "shorten it",
            field=field,
        )
    document = Controlled(said[0]) if isinstance(body, CompletionBody) else _asked(body.messages)
    found = encode(served.tokenizer, document)
    count = len(found.ids)
    if not count:
        raise Refused(f"{field}: expected at least one token of text", field=field)
    if served.window is not None and count >= served.window:
        raise Refused(
            f"{field}: {count:,} tokens leave no room for an answer in this model's window of {served.window:,}; "
            "shorten it",
            field=field,
        )
    ids = torch.tensor([found.ids], device=served.model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if served.model.config.num_token_id is not None:
        inputs[VALUES] = torch.tensor([found.values], dtype=torch.float64, device=ids.device)
    return inputs


def _asked(turns: Sequence[Turn]) -> Asked:
    said = [{"role": turn.role, "content": turn.text} for turn in turns]
    return Asked(json.dumps({"messages": said}))
