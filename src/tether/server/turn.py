"""One request as it is answered: what it asks for, its place in the line, and what came of it."""

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.utils import BaseGenerateManager, InferenceThread, _StreamError

from tether.causal.encoding import VALUES
from tether.causal.mixture import Mixture
from tether.causal.noise import Noise
from tether.errors import TetherError
from tether.server.bodies import SEEDS, ChatBody, CompletionBody
from tether.server.counts import Counts
from tether.server.models import Served
from tether.server.refusal import Refused
from tether.server.told import check_told, told
from tether.server.writer import Ended, Writer

__all__ = ["NEW_TOKENS", "Desk", "Turn", "said_of"]

logger = logging.getLogger(__name__)

NEW_TOKENS = 1024
"""New tokens at most, unless the server was told otherwise; transformers' own server has the same number."""


CLOSE_SECONDS = 10.0
"""That the end of the server waits for the token that is being written."""


class Desk:
    """Where requests are answered, one after the other: one thread for all models, since all share torch's generator.

    Args:
        counts: of the server.
        new_tokens: that an answer has at most.

    Attributes:
        thread: on which everything is computed.
        turns: requests that wait or are being answered.
        ending: whether the server ends.
    """

    def __init__(self, counts: Counts, new_tokens: int = NEW_TOKENS) -> None:
        self.counts, self.new_tokens = counts, new_tokens
        self.thread = InferenceThread()
        self.turns: set[Turn] = set()
        self.ending = False

    def cut(self) -> None:
        """Stop what waits and what is being written at its next token, and say so to those who asked."""
        self.ending = True
        for turn in tuple(self.turns):
            turn.writer.cancel()

    def close(self) -> None:
        """Stop everything, and wait for it."""
        self.cut()
        # A long prompt that is being read cannot be cut off.
        wait([self.thread.submit(lambda: None)], timeout=CLOSE_SECONDS)


def said_of(error: BaseException) -> tuple[str, int]:
    """Say in one sentence what went wrong, and with which status.

    Args:
        error: raised while a request was answered.

    Returns:
        What the client is told. Of a fault of ours it is told nothing more than that.
    """
    if isinstance(error, Refused):
        return error.message, error.status
    if isinstance(error, TetherError):
        return str(error), 400
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory: send a shorter prompt, or ask for fewer tokens", 503
    return "a fault of the server itself; its log says more", 500


class Turn(BaseGenerateManager):  # type: ignore[misc]
    """One request.

    Args:
        body: of the request, checked.
        served: the model that answers.
        inputs: of `prompt_of`.
        desk: where it is answered.

    Attributes:
        config: how to write.
        writer: hears the tokens.
        figures: what the answer says of itself, or None.
        failure: what the client is told of an answer that was cut off in a stream, and the status; or None.

    Raises:
        Refused: it asks for what the model or the server cannot do.
    """

    def __init__(
        self, body: ChatBody | CompletionBody, served: Served, inputs: dict[str, Tensor], desk: Desk
    ) -> None:
        self.body, self.served, self.inputs, self.desk = body, served, inputs, desk
        self.mode = str(served.model.config.mode)
        if body.tether:
            check_told(served.model)
        self.prompt = inputs["input_ids"].shape[1]
        self.config = self._config()
        self.seed = secrets.randbelow(SEEDS + 1) if body.seed is None else body.seed
        self.figures: dict[str, Any] | None = None
        self.failure: tuple[str, int] | None = None
        self._give: Callable[[str | None], None] = lambda _: None
        number = served.model.config.num_token_id
        self.writer = Writer(served.tokenizer, number, body.stops, lambda piece: self._give(piece))

    def _config(self) -> GenerationConfig:
        body, served = self.body, self.served
        if self.mode != "softmax" and (body.temperature or body.top_p not in (None, 1)):
            field = "temperature" if body.temperature else "top_p"
            raise Refused(
                f"{field}: this model acts in mode {self.mode}, and only softmax mode takes one; leave it out",
                field=field,
            )
        room = self.desk.new_tokens
        if served.window is not None:
            room = min(room, served.window - self.prompt)
        asked = self.body.limit
        if asked is not None and asked > room:
            raise Refused(
                f"max_tokens: {asked:,} are more than the {room:,} that this server writes after a prompt of "
                f"{self.prompt:,} tokens",
                field="max_tokens",
            )
        config = copy.deepcopy(served.model.generation_config)
        config.max_new_tokens, config.max_length = room if asked is None else asked, None
        config.num_return_sequences = config.num_beams = None
        config.pad_token_id = (
            served.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        )
        if body.temperature == 0:
            config.do_sample, config.temperature, config.top_p = False, None, None
        elif body.temperature is not None or body.top_p not in (None, 1):
            config.do_sample = True
            config.temperature = config.temperature if body.temperature is None else body.temperature
            config.top_p = config.top_p if body.top_p is None else body.top_p
        return config

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: `length`, or `stop` at a text to stop at, an end token, or the client's leave."""
        ends = self.config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        written = self.writer.ids
        full = len(written) >= self.config.max_new_tokens
        return "length" if full and not self.writer.stopped and written[-1] not in ends else "stop"

    def generate_streaming(self, *_: Any, **__: Any) -> tuple[asyncio.Queue[Any], Writer]:
        """Begin to answer piece by piece; called by transformers' handlers.

        Returns:
            A queue that gets each piece and None at the end, and who is told when the client has gone.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                self._write()
            except Exception as error:
                message, status = said_of(error)
                if status >= 500 and not isinstance(error, Refused):
                    logger.error("a request failed", exc_info=error)
                self.failure = message, status
                put(_StreamError(""))
            else:
                put(None)

        self._give = put
        self._line_up(work)
        return queue, self.writer

    async def generate_non_streaming(self, *_: Any, **__: Any) -> tuple[str, int, list[int]]:
        """Answer as a whole; called by transformers' handlers.

        Returns:
            The text, how many tokens the prompt has, and the ids written.
        """
        await asyncio.wrap_future(self._line_up(self._write))
        return self.writer.text, self.prompt, self.writer.ids

    def stop(self) -> None:
        """Do nothing; the thread is the desk's."""

    def _line_up(self, work: Callable[[], None]) -> Future[None]:
        self.desk.turns.add(self)
        future: Future[None] = self.desk.thread.submit(work)
        future.add_done_callback(lambda _: self.desk.turns.discard(self))
        return future

    def _check_open(self) -> None:
        if self.desk.ending:
            raise Refused("the server ends; ask again when it is back", 503)

    def _write(self) -> None:
        self._check_open()
        if self.writer.gone():
            return
        begun = time.perf_counter()
        model = self.served.model
        options: dict[str, Any] = {}
        if self.mode == "causal":
            options["noise"] = Noise.draw(1, model.latent_size, seed=self.seed)
        weights = _Weights() if isinstance(model.fusion, Mixture) else None
        if weights is not None:
            options["output_weights"] = True
        hook = model.register_forward_hook(weights) if weights is not None else None
        try:
            with torch.random.fork_rng():
                # Nobody else computes on this thread, nor draws from this generator.
                torch.random.manual_seed(self.seed)
                written = model.generate(
                    **self.inputs,
                    generation_config=self.config,
                    streamer=self.writer,
                    stopping_criteria=StoppingCriteriaList([Ended(self.writer)]),
                    return_dict_in_generate=True,
                    **options,
                )
        finally:
            if hook is not None:
                hook.remove()
        if self.writer.gone():
            self._check_open()
        elif self.body.tether:
            values = written.get(VALUES)
            self.figures = told(
                model, written["sequences"][0], None if values is None else values[0], self.prompt
            )
        count = len(self.writer.ids)
        self.desk.counts.answered(self.served.name, self.prompt, count, time.perf_counter() - begun)
        if weights is not None and weights.sum is not None:
            self.desk.counts.weighed(self.served.name, weights.of(model.fusion))


class _Weights:
    """Adds up the weights with which each token was served; called after each step of the model."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def __call__(self, model: Any, inputs: Any, output: Any) -> None:
        served = output.log_weights[0, -1].exp()
        self.sum = served if self.sum is None else self.sum + served

    def of(self, mixture: Mixture) -> dict[str, float]:
        """Give the weight of the base and of each domain, added up over tokens.

        Args:
            mixture: of the model.

        Returns:
            By name.
        """
        assert self.sum is not None
        parts = {
            name: float(self.sum[rows].sum())
            for name, rows in zip(mixture.domains, mixture.rows, strict=True)
        }
        return {"base": float(self.sum[0])} | parts
