"""Limit the time in which the headers of a request must arrive. uvicorn has no such limit."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0  # from the connection, or the first byte of a further request, to the end of the headers
LINGER_S = 60.0  # for the client to read the last response of a connection


class Connection(H11Protocol):
    """An HTTP connection that closes if the headers of a request take longer than `header_s`."""

    header_s, linger_s = HEADER_S, LINGER_S
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Start or stop the time limit, as the parser's state requires."""
        super().data_received(data)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._stop_waiting()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. Abort it if the client does not read the last response within `linger_s`."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.linger_s, self.transport.abort)

    def _wait_for_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
