"""Test the guard in front of a real server: hosts, origins, bytes, seconds, headers."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from mura_dist.core.errors import UserError
from mura_dist.inference.page import server
from mura_dist.inference.page.connection import Connection
from mura_dist.inference.page.guard import (
    HOST_REFUSED,
    ORIGIN_REFUSED,
    SESSIONS_FULL,
    UPLOAD_SLOW,
    UPLOADS_FULL,
    AllowedHosts,
    Guard,
    RequestLimits,
    content_security_policy,
    security_headers,
)

HOSTS = AllowedHosts(frozenset({"localhost", "page.hospital.example"}))
LIMITS = RequestLimits(uploads_bytes=100_000, idle_s=0.6, body_s=1.5, sessions=2)
HEADERS = security_headers(content_security_policy("<script>inline()</script>"))


async def measure(request: Request) -> PlainTextResponse:
    """Answer with the number of bytes; `hold` keeps the request unfinished until the guard's test lets it go."""
    size = len(await request.body())
    while "hold" in request.query_params and not request.app.state.released.is_set():
        await asyncio.sleep(0.01)
    return PlainTextResponse(str(size))


async def stay(websocket: WebSocket) -> None:
    await websocket.accept()
    with contextlib.suppress(Exception):
        await websocket.receive_bytes()


class ImpatientConnection(Connection):
    header_s = LIMITS.idle_s


@pytest.fixture(scope="module")
def guard() -> Guard:
    app = Starlette(routes=[Route("/", measure, methods=["GET", "PUT"]), WebSocketRoute("/stream", stay)])
    app.state.released = threading.Event()
    return Guard(app, HOSTS, HEADERS, LIMITS)


@pytest.fixture(scope="module")
def port(guard: Guard) -> Iterator[int]:
    config = uvicorn.Config(guard, http=ImpatientConnection, ws="websockets-sansio", log_level="critical")
    uvicorn_server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not uvicorn_server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        uvicorn_server.should_exit = uvicorn_server.force_exit = True
        thread.join(10)


class Client:
    """One connection that sends given bytes and reads a response."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, text: str | bytes) -> None:
        self.socket.sendall(text.encode() if isinstance(text, str) else text)

    def answer(self) -> tuple[int, dict[str, str], str]:
        """Return (status, headers by lower-case name, body), or (0, {}, "") where the connection is closed."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in data and (chunk := self.socket.recv(65536)):
                data += chunk
        if not data:
            return 0, {}, ""
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += self.socket.recv(65536)
        return int(first.split()[1]), headers, body.decode()


def request(method: str = "GET", target: str = "/", host: str | None = "localhost:8501", **headers: object) -> str:
    lines = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    rows = [f"{name}: {value}" for name, value in lines.items() if value is not None]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *rows, "", ""])


def send_request(port: int, *chunks: str | bytes) -> tuple[int, dict[str, str], str]:
    with Client(port) as client:
        for chunk in chunks:
            client.send(chunk)
        return client.answer()


# ---- hosts and origins


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8501", "localhost.", "127.0.0.1:8501", "192.0.2.7", "[::1]:8501", "page.hospital.example"],
)
def test_allowed_hosts_and_addresses(port: int, host: str) -> None:
    assert send_request(port, request(host=host))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "evil.example:8501", "127.0.0.1.evil.example", "", "[::1"),
        *("localhost:99999", "user@localhost", "localhost/x", "localhost?x", "evil.page.hospital.example"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_other_host_is_refused(port: int, host: str, method: str) -> None:
    status, _, body = send_request(port, request(method, host=host))
    assert (status, body) == (421, HOST_REFUSED)


def test_missing_or_duplicate_host_is_refused(port: int) -> None:
    assert send_request(port, request(host=None))[0] == 400, "HTTP requires one"
    assert send_request(port, request(HOST="evil.example"))[0] in (400, 421)


def test_other_origin_is_refused(port: int) -> None:
    own = "http://localhost:8501"
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": 13}
    upgrade["sec_websocket_key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    for origin in ("http://evil.example", "null", "http://localhost:9999", "http://127.0.0.1:8501"):
        assert send_request(port, request("PUT", origin=origin, content_length=1), "x")[::2] == (403, ORIGIN_REFUSED)
        assert send_request(port, request(target="/stream", origin=origin, **upgrade))[::2] == (403, ORIGIN_REFUSED)
    assert send_request(port, request("PUT", origin=own, content_length=1), "x")[::2] == (200, "1")
    assert send_request(port, request("PUT", content_length=1), "x")[::2] == (200, "1")
    assert send_request(port, request(target="/stream", origin=own, **upgrade))[0] == 101
    assert (
        send_request(port, request(target="/stream", host="evil.example", origin="http://evil.example", **upgrade))[0]
        == 421
    )


def test_session_limit(port: int, guard: Guard) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": 13}
    text = request(target="/stream", sec_websocket_key="AAAAAAAAAAAAAAAAAAAAAA==", **upgrade)
    until(lambda: guard.num_sessions == 0)
    with Client(port) as first, Client(port) as second, Client(port) as third:
        for client in (first, second, third):
            client.send(text)
        assert [client.answer()[0] for client in (first, second)] == [101, 101]
        assert third.answer()[::2] == (503, SESSIONS_FULL)
    until(lambda: guard.num_sessions == 0)
    assert send_request(port, text)[0] == 101


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- limits


def test_unfinished_uploads_share_a_limit(port: int, guard: Guard) -> None:
    """A request above the limit is refused, with or without Content-Length. Refused and finished requests do not count."""
    half_bytes = LIMITS.uploads_bytes // 2
    guard.app.state.released.clear()
    with Client(port) as first, Client(port) as second:
        for client in (first, second):
            client.send(request("PUT", "/?hold", content_length=half_bytes) + "x" * half_bytes)
        until(lambda: guard.unfinished_bytes == 2 * half_bytes)
        status, headers, body = send_request(port, request("PUT", content_length=9), "x" * 9)
        assert (status, body, headers["retry-after"]) == (503, UPLOADS_FULL, "60")
        chunked = request("PUT", transfer_encoding="chunked") + "9\r\nxxxxxxxxx\r\n0\r\n\r\n"
        assert send_request(port, chunked)[::2] == (503, UPLOADS_FULL)
        assert send_request(port, request())[0] == 200, "requests without a body get a response"
        assert guard.unfinished_bytes == 2 * half_bytes
        guard.app.state.released.set()
        assert [client.answer()[::2] for client in (first, second)] == [(200, str(half_bytes))] * 2
    until(lambda: guard.unfinished_bytes == 0)
    assert send_request(port, request("PUT", content_length=2 * half_bytes), "x" * 2 * half_bytes)[::2] == (
        200,
        str(2 * half_bytes),
    )


def test_too_large_upload_is_refused_after_reading_it(port: int, guard: Guard) -> None:
    """The response follows the complete body, since a browser reads it only then."""
    size = 40 * LIMITS.uploads_bytes
    for head in (request("PUT", content_length=size), request("PUT", connection="close", content_length=size)):
        assert send_request(port, head, b"x" * size)[::2] == (503, UPLOADS_FULL)
    assert guard.unfinished_bytes == 0


def test_disconnected_client_releases_its_bytes(port: int, guard: Guard) -> None:
    with Client(port) as client:
        client.send(request("PUT", content_length=90_000) + "x" * 50_000)
        until(lambda: guard.unfinished_bytes == 50_000)
    until(lambda: guard.unfinished_bytes == 0)


# ---- timeouts


@pytest.mark.parametrize("chunks", [[], ["GET / HT"], [request()[:-2]]])
def test_missing_headers_close_the_connection(port: int, chunks: list[str]) -> None:
    start_s = time.monotonic()
    assert send_request(port, *chunks) == (0, {}, "")
    assert 0.5 < time.monotonic() - start_s < 5


def test_trickled_headers_close_the_connection(port: int) -> None:
    """This includes a connection's second request. A single byte does not extend the time."""
    with Client(port) as client:
        client.send(request())
        assert client.answer()[0] == 200
        start_s = time.monotonic()
        with contextlib.suppress(OSError):
            for letter in request(x="y" * 1000):
                client.send(letter)
                time.sleep(0.05)
        assert 0.5 < time.monotonic() - start_s < 5


def test_request_within_limits_succeeds(port: int) -> None:
    with Client(port) as client:
        for _ in range(2):
            client.send(request("PUT", content_length=2))
            time.sleep(0.2)
            client.send("x")
            time.sleep(0.2)
            client.send("x")
            assert client.answer()[::2] == (200, "2")
            time.sleep(0.2)


@pytest.mark.parametrize(("pause_s", "limit_s"), [(5.0, LIMITS.idle_s), (0.2, LIMITS.body_s)])
def test_slow_body_is_refused(port: int, guard: Guard, pause_s: float, limit_s: float) -> None:
    """This covers a body that stops, and one that arrives byte by byte."""
    start_s = time.monotonic()
    with Client(port) as client:
        client.send(request("PUT", content_length=1000))
        trickle = threading.Event()

        def send() -> None:
            with contextlib.suppress(OSError):
                while not trickle.wait(pause_s):
                    client.send("x")

        thread = threading.Thread(target=send)
        thread.start()
        try:
            answer = client.answer()[::2]
            assert answer == (408, UPLOAD_SLOW) or (
                pause_s < 1 and answer == (0, "")
            )  # a byte sent too late resets the connection
        finally:
            trickle.set()
            thread.join()
    assert 0.5 < time.monotonic() - start_s < limit_s + 5
    until(lambda: guard.unfinished_bytes == 0)


# ---- headers


def test_every_response_has_security_headers(port: int) -> None:
    expected_headers = {name.lower(): value for name, value in HEADERS.items()}
    answers = {
        200: send_request(port, request()),
        403: send_request(port, request("PUT", origin="http://evil.example")),
        404: send_request(port, request(target="/none")),
        405: send_request(port, request("POST")),
        408: send_request(port, request("PUT", content_length=9)),
        421: send_request(port, request(host="evil.example")),
    }
    for status, (actual, headers, _) in answers.items():
        assert actual == status
        assert expected_headers.items() <= headers.items(), status
        assert headers["cache-control"] == "no-store", status
    assert "cache-control" not in send_request(port, request(target="/static/none"))[1]


def test_policy_allows_scripts_by_hash() -> None:
    policy = content_security_policy('<script>\n  a = 1\n</script><script src="x.js"></script>')
    # printf '\n  a = 1\n' | openssl dgst -sha256 -binary | base64
    assert "script-src 'self' 'sha256-nHiJsB1GRX6Ku2XBkWKVt2F3CJiowPuMwhcJv+CWmC0='; " in policy
    assert "'unsafe-inline'" not in re.search("script-src[^;]*", policy)[0]  # type: ignore[index]
    assert "default-src 'none'" in policy


# ---- allowed host names


@pytest.mark.parametrize(
    ("address", "allowed", "names"),
    [
        ("127.0.0.1", (), {"localhost"}),
        ("::1", ("Page.Example.",), {"localhost", "page.example"}),
        ("0.0.0.0", (), {"localhost", socket.gethostname().lower()}),
        ("ward7", ("x",), {"localhost", "ward7", "x", socket.gethostname().lower()}),
    ],
)
def test_allowed_hosts_of_an_address(address: str, allowed: tuple[str, ...], names: set[str]) -> None:
    assert server._hosts(address, allowed).names == names


@pytest.mark.parametrize("name", ["https://x.example", "x.example:8501", "*", "*.example", "a b", "", "x/y", "-x"])
def test_invalid_allow_host_is_rejected(name: str) -> None:
    with pytest.raises(UserError, match=r"not a host name. Give it without http:// and port"):
        server._hosts("127.0.0.1", [name])
