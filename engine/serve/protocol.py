"""HTTP as uvicorn speaks it, with a time limit for headers, and with refusals of one form."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(seconds: float) -> type[H11Protocol]:
    """The protocol of a server that waits so long for a request's headers."""

    class Protocol(H11Protocol):
        """uvicorn waits for headers as long as it takes: idle connections could take all places."""

        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            """Headers are on their way, or they have come."""
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self._limit is None:
                self._limit = self.loop.call_later(seconds, self._late)

        def _unwatch(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _late(self) -> None:
            self._limit = None
            if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
                self._refuse(408, f"the request did not arrive within {seconds:g} seconds")

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is no HTTP request, or its headers are too long")

        def _refuse(self, code: int, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            answer: list[Any] = [
                h11.Response(status_code=code, headers=list(headers.items()), reason=HTTPStatus(code).phrase),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            for event in answer:
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol
