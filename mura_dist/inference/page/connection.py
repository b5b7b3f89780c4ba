"""An HTTP connection whose headers arrive in time: uvicorn's, with a time limit that uvicorn has none of."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0  # from the connection, or from the first byte of a further request, to the end of its headers
LINGER_S = 60.0  # for the last response of a connection to be read


class Connection(H11Protocol):
    """One connection of a browser. It closes where a request's headers take longer than `header_s`."""

    header_s, linger_s = HEADER_S, LINGER_S
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. One whose client does not read the rest of its response is cut off."""
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
