"""transformers' handlers of requests, with our checks before them and what an answer says of itself after them."""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState

from tether.server.bodies import ChatBody, CompletionBody, read_body
from tether.server.call import CALL
from tether.server.models import Models
from tether.server.prompt import prompt_of
from tether.server.refusal import refusal
from tether.server.turn import Desk, Turn

__all__ = ["Chat", "Completions"]

DONE: Final = "data: [DONE]\n\n"
"""Ends a stream, as OpenAI's server ends it."""
FAILED: Final = 'data: {"error": ""}\n\n'
"""Ends a stream of transformers' handlers that failed."""


# The engine's own form of an error in a stream has no room for more than a text, and clients do not show it.
async def _with_failure(parts: AsyncGenerator[str, None], turn: Turn) -> AsyncGenerator[str, None]:
    async with aclosing(parts):
        async for part in parts:
            if turn.failure is None or not part.endswith(FAILED):
                yield part
                continue
            yield part.removesuffix(FAILED)
            yield f"data: {json.dumps(refusal(*turn.failure))}\n\n"


class _Answering(BaseHandler):  # type: ignore[misc]
    """What both handlers do; each request is answered by a copy of its own, which knows its turn.

    Args:
        models: that are served.
        desk: where they answer.
    """

    kind: type[ChatBody] | type[CompletionBody]

    def __init__(self, models: Models, desk: Desk) -> None:
        super().__init__(models, GenerationState())
        self.desk = desk
        self.turn: Turn | None = None

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request.

        Args:
            body: as JSON gave it.
            request_id: by which the answer is called.

        Returns:
            A response, streaming or not.
        """
        asked = read_body(self.kind, body)
        served = self.model_manager.find(asked.model)
        call = CALL.get()
        call.model = served.name
        # A long text is tokenised beside what else the server does.
        inputs = await asyncio.to_thread(prompt_of, asked, served)
        own = copy.copy(self)
        own.turn = turn = Turn(asked, served, inputs, self.desk)
        call.at_leave(turn.writer.cancel)
        given = request_id, served.model, served.tokenizer, served.name, inputs, turn.config
        if asked.stream:
            stream = own._streaming(*given, gen_manager=turn)
            stream.body_iterator = _with_failure(stream.body_iterator, turn)
            return stream
        whole = await own._non_streaming(*given, gen_manager=turn)
        content = json.loads(whole.body)
        content["choices"][0]["finish_reason"] = turn.finish_reason
        if turn.figures is not None:
            content["tether"] = turn.figures
        return JSONResponse(content)

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, **fields: Any) -> str:
        turn = self.turn
        if finish_reason is None or turn is None:
            return str(super()._build_chunk_sse(*args, finish_reason=finish_reason, **fields))
        last = str(super()._build_chunk_sse(*args, finish_reason=turn.finish_reason, **fields))
        if turn.figures is not None:
            content = json.loads(last.removeprefix("data: "))
            last = f"data: {json.dumps(content | {'tether': turn.figures})}\n\n"
        return last + DONE


class Chat(_Answering, ChatCompletionHandler):  # type: ignore[misc]
    """Answers `/v1/chat/completions`."""

    kind = ChatBody


class Completions(_Answering, CompletionHandler):  # type: ignore[misc]
    """Answers `/v1/completions`."""

    kind = CompletionBody
