"""The application: transformers' server with our models, handlers and entrance; and its port."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from tether.errors import ConfigError, TetherError
from tether.server.counts import Counts
from tether.server.entrance import ONE_MODEL, Entrance
from tether.server.handlers import Chat, Completions
from tether.server.models import Models
from tether.server.refusal import Refused, refusal
from tether.server.turn import NEW_TOKENS, Desk, said_of

__all__ = ["Server", "build_app", "is_loopback", "open_port"]

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 5
"""That answers have to end when the server is to end; then they are cut."""
CUT_SECONDS = 20
"""That cutting them may take: a long prompt is read to its end."""
CONNECTIONS = 1000
"""More at once are told to come again later."""


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address.

    Args:
        host: name or number.

    Returns:
        Whether it is the loopback.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_port(host: str, port: int) -> socket.socket:
    """Take a port, without listening yet: whoever connects before the models are there is refused.

    Args:
        host: name or number of an address of this machine.
        port: 0 takes any that is free.

    Returns:
        The socket.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        # Otherwise a server that has just ended would keep the port for a minute.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise ConfigError(
            f"{host}, port {port}: {error.strerror or error}; name another with --host or --port (0 takes any)"
        ) from error
    return found


def build_app(models: Models, *, key: str | None = None, new_tokens: int = NEW_TOKENS) -> FastAPI:
    """Put the application together.

    Args:
        models: that it serves.
        key: that requests must bring, or None.
        new_tokens: that an answer has at most.

    Returns:
        The application.
    """
    counts = Counts(models.served)
    desk = Desk(counts, new_tokens)
    models.at_end.append(desk.close)
    handlers: dict[str, Any] = {
        "chat_handler": Chat(models, desk), "completion_handler": Completions(models, desk),
        "response_handler": None, "transcription_handler": None, "systemone_handler": None,
    }  # fmt: skip
    app: FastAPI = build_server(models, generation_state=GenerationState(), **handlers)

    @app.get(ONE_MODEL + "{name:path}")
    def one_model(name: str) -> JSONResponse:
        return JSONResponse(models.described(models.find(name)))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(counts.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def refused(request: Request, error: Exception) -> JSONResponse:
        message, status = said_of(error)
        field = error.field if isinstance(error, Refused) else None
        return JSONResponse(refusal(message, status, field), status)

    async def no_json(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(refusal("the body is not a JSON object", 400), 400)

    async def of_the_framework(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = "the body is not a JSON object" if status == 400 else "not served here"
        return JSONResponse(refusal(said, status), status)

    known: tuple[tuple[type[Exception], Callable[..., Any]], ...] = (
        (Refused, refused), (TetherError, refused), (MemoryError, refused), (Exception, refused),
        (RequestValidationError, no_json), (HTTPException, of_the_framework),
    )  # fmt: skip
    for kind, handler in known:
        app.add_exception_handler(kind, handler)
    app.state.cut = desk.cut
    app.add_middleware(Entrance, key=key, counts=counts)
    return app


class Server(uvicorn.Server):
    """Serves an application on a socket.

    Args:
        app: of `build_app`.
        ready: called once it listens.
    """

    def __init__(self, app: FastAPI, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=LEAVE_SECONDS + CUT_SECONDS, ws="none",
        )  # fmt: skip
        super().__init__(config)
        self.ready, self.cut = ready, app.state.cut

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Begin to listen.

        Args:
            sockets: as of `open_port`.
        """
        await super().startup(sockets=list(sockets or ()))
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, and let answers end, for a while.

        Args:
            sockets: as of `open_port`.
        """
        later = asyncio.get_running_loop().call_later(LEAVE_SECONDS, self.cut)
        await super().shutdown(sockets=sockets)
        later.cancel()
