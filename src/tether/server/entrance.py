"""The way into the server: who may enter, by which path, with how large a body; and who has left again."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from tether.server.call import CALL, Call
from tether.server.counts import Counts
from tether.server.refusal import Refused, refusal

__all__ = ["BODY_BYTES", "Entrance"]

BODY_BYTES: Final = 4 << 20
"""Bytes of a body at most: some millions of letters, more than any prompt."""
DRAINED: Final = 16 * BODY_BYTES
"""Bytes of a larger body that are taken and dropped, before the connection is closed."""
BODY_SECONDS: Final = 60.0
"""In which a body has to arrive."""
PATHS: Final = {
    "/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET",
    "/metrics": "GET",
}  # fmt: skip
"""What is served, and how; the engine of transformers has more."""
ONE_MODEL: Final = "/v1/models/"
OPEN: Final = "/health"
"""Says only that the server is there, to whoever asks."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Entrance:
    """An ASGI middleware around the whole application.

    Args:
        app: the application.
        key: that requests must bring as a bearer; None lets everybody in.
        counts: of the server.
    """

    def __init__(self, app: Any, key: str | None, counts: Counts) -> None:
        self.app, self.counts = app, counts
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it.

        Args:
            scope: of ASGI.
            receive: of ASGI.
            send: of ASGI.
        """
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        call = Call()
        CALL.set(call)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            elif not message.get("more_body", False):
                call.ended = not call.left.is_set()
            await send(message)

        try:
            self._check(scope)
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(scope, receive, call)
        except TimeoutError:
            await _refuse(watched, Refused(f"the body did not arrive within {BODY_SECONDS:g} seconds", 408))
        except Refused as refused:
            await _refuse(watched, refused)
        else:
            await self._enter(scope, body, receive, watched, call)
        finally:
            left = call.left.is_set() and not call.ended
            self.counts.ended(call.model, 499 if left or call.status is None else call.status)

    async def _enter(
        self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send, call: Call
    ) -> None:
        if call.left.is_set():
            return
        brought = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            if brought:
                return brought.pop()
            await call.left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            call.leave()

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, again, send)
        finally:
            watching.cancel()

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        path, method = scope["path"], scope["method"]
        if path != OPEN and self.key is not None and not hmac.compare_digest(_bearer(scope), self.key):
            raise Refused("no key, or a wrong one: send the server's as 'Authorization: Bearer KEY'", 401)
        allowed = "GET" if path.startswith(ONE_MODEL) else PATHS.get(path)
        if allowed is None:
            raise Refused(
                f"{ascii(path)[1:-1][:80]}: not served here; expected one of {', '.join(PATHS)}", 404
            )
        if method != allowed:
            raise Refused(f"{path}: expected {allowed}", 405)
        kind = _header(scope, b"content-type").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            # A web page can send anything else to a port of this machine without its owner knowing.
            raise Refused("expected a body with 'Content-Type: application/json'", 415)


def _header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    return next((bytes(value) for each, value in scope["headers"] if each == name), b"")


def _bearer(scope: MutableMapping[str, Any]) -> bytes:
    kind, _, key = _header(scope, b"authorization").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


async def _read(scope: MutableMapping[str, Any], receive: Receive, call: Call) -> bytes:
    told = _header(scope, b"content-length")
    parts: list[bytes] = []
    size, more, over = 0, True, told.isdigit() and int(told) > DRAINED
    while more and not over:
        message = await receive()
        if message["type"] == "http.disconnect":
            call.leave()
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            # A client that is still sending would not read the answer, so the rest is taken and dropped.
            parts.clear()
        more, over = message.get("more_body", False), size > DRAINED
    if over or size > BODY_BYTES:
        raise Refused(f"a body of more than {BODY_BYTES:,} bytes; send less text", 413)
    return b"".join(parts)


async def _refuse(send: Send, refused: Refused) -> None:
    body = json.dumps(refusal(refused.message, refused.status, refused.field)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status in (408, 413):
        # What is still on its way would be read as the next request.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
