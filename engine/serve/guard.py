"""What is refused before a request's body is read: strangers, wrong types, too many bytes, slow senders.

Plain ASGI: FastAPI would read the body first.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from engine.serve.metrics import Metrics
from engine.serve.work import Limits, Refused, Works

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_LINGER = 5.0  # seconds for which the body of a refused request is taken, so that its sender reads the answer


class State:
    """Of a service: whether it stops, and how many requests it has begun to read."""

    def __init__(self) -> None:
        self.stopping = False
        self.open = 0


def refusal(code: int, message: str, retry: int | None = None, *, close: bool = False) -> JSONResponse:
    """An answer of one sentence."""
    headers = {"Retry-After": str(retry)} if retry is not None else {}
    headers |= {"WWW-Authenticate": "Bearer"} if code == 401 else {}
    headers |= {"Connection": "close"} if close else {}
    return JSONResponse({"error": message}, code, headers)


class Guard:
    """ASGI middleware around the whole service.

    Args:
        app: the service.
        works, limits, metrics, state: of the service.
        token: what a request must bring as `Authorization: Bearer TOKEN`; None lets everybody in.
    """

    def __init__(self, app: Any, works: Works, limits: Limits, metrics: Metrics, state: State, token: str | None):
        self.app, self.works, self.limits, self.metrics = app, works, limits, metrics
        self.state, self.token = state, token

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        known = {"/v1/upscale", "/health", "/ready", "/metrics", "/docs", "/openapi.json"}
        path = scope["path"] if scope["path"] in known else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if scope["method"] != "POST":
            return await self.app(scope, receive, count)
        self.state.open += 1
        try:
            bounded = _Bounded(receive, self.limits)
            try:
                self._admit(Headers(scope=scope))
            except Refused as error:
                if "expect" not in Headers(scope=scope):
                    await bounded.discard()
                close = not bounded.ended
                return await refusal(error.code, str(error), error.retry, close=close)(scope, receive, count)
            await self.app(scope, bounded, count)
        finally:
            self.state.open -= 1

    def _admit(self, headers: Headers) -> None:
        """Judge a request by its headers."""
        if self.token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())  # bytes as they came
            if scheme.lower() != "bearer" or not same:
                raise Refused(401, "send the service's token: Authorization: Bearer TOKEN")
        if self.state.stopping:
            raise Refused(503, "the service is stopping; send it again", 5)
        kind = headers.get("content-type", "nothing")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise Refused(415, f"send multipart/form-data with the picture in the field image; got {kind[:80]}")
        if int(headers.get("content-length", "0")) > self.limits.max_bytes:
            raise _too_large(self.limits)
        self.works.check_room()


class _Bounded:
    """A request's body, within limits of size and time."""

    def __init__(self, receive: Receive, limits: Limits):
        self._receive, self._limits = receive, limits
        self._bytes, self._until = 0, time.monotonic() + limits.body_seconds
        self.ended = False

    async def __call__(self) -> Message:
        if self.ended:
            return await self._receive()  # tells when the client has gone
        try:
            async with asyncio.timeout(max(self._until - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise HTTPException(408, f"the request did not arrive within {seconds:g} seconds") from None
        self._bytes += len(message.get("body", b""))
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._bytes > self._limits.max_bytes:
            raise HTTPException(413, str(_too_large(self._limits)))
        return message

    async def discard(self) -> None:
        """Take the body without keeping it, as far as the limits go."""
        self._until = min(self._until, time.monotonic() + _LINGER)
        try:
            while not self.ended:
                await self()
        except HTTPException:
            pass


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the request is too large; at most {limits.max_bytes / 2**20:g} MiB are taken")
