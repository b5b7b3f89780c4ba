"""Protect Streamlit from the network, as ASGI middleware.

    request -> check Host and Origin -> limit the body's bytes and seconds -> Streamlit -> add security headers

A slow or large body is refused while it arrives. connection.py limits the time of the headers.
"""

import asyncio
import ipaddress
import re
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST_REFUSED = "host name not allowed; start the page with --allow-host NAME"
ORIGIN_REFUSED = "requests from another web site are not allowed"
UPLOADS_FULL = "too many uploads at this moment; try again in a minute"
SESSIONS_FULL = "too many sessions are open; try again later"
UPLOAD_SLOW = "the upload is too slow; try again on a faster connection"
STATIC_PREFIX = "/static/"  # Streamlit's own files, the only ones that may be cached


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the requests."""

    uploads_bytes: int = 1 << 30  # sum of all unfinished uploads; parsing briefly needs twice as much memory
    idle_s: float = 30.0  # between two chunks of a body
    body_s: float = 300.0  # for a complete body: 100 MB at 3 Mbit/s
    sessions: int = 100


DEFAULT = RequestLimits()


@dataclass(frozen=True)
class AllowedHosts:
    """The host names that requests may use, in lower case. IP addresses are always allowed.

    This stops DNS rebinding, where a web site points its own name at this machine: the browser sends that name.
    """

    names: frozenset[str]

    def allows(self, host: str) -> bool:
        """Return whether a Host header, with or without a port, is allowed."""
        try:
            url = urlsplit(f"//{host}")
            name, _ = (url.hostname or "").rstrip("."), url.port
        except ValueError:
            return False
        if url.netloc != host or "@" in host:  # contains a path, a query or a user
            return False
        return name in self.names or is_address(name)


def is_address(name: str) -> bool:
    """Return whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def content_security_policy(index_html: str) -> str:
    """Return a policy that allows Streamlit's own files, inline styles, and the inline scripts of index.html by their hash."""
    scripts = re.findall(r"<script>(.*?)</script>", index_html, re.DOTALL)
    hashes = "".join(f" 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self'{hashes}",
            "style-src 'self' 'unsafe-inline'",  # emotion writes styles into the page
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "manifest-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def security_headers(policy: str) -> dict[str, str]:
    """Return the headers of every response."""
    return {
        "Content-Security-Policy": policy,
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


class Guard:
    """ASGI middleware that checks and limits requests.

    Args:
        app: The application behind it.
        hosts: The allowed host names.
        headers: Added to every response.
        limits: Bytes, seconds and sessions.
    """

    def __init__(
        self, app: ASGIApp, hosts: AllowedHosts, headers: dict[str, str], limits: RequestLimits = DEFAULT
    ) -> None:
        self.app, self.hosts, self.headers, self.limits = app, hosts, headers, limits
        self.unfinished_bytes = self.num_sessions = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI defines it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
                if not scope["path"].startswith(STATIC_PREFIX):  # a cache would write pictures and tables to a disk
                    headers["Cache-Control"] = "no-store"
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send_headers)
        elif scope["type"] == "websocket":
            await self._session(scope, receive, send_headers)
        else:
            body = _Body(self, receive, Headers(scope=scope).get("content-length", ""))
            try:
                await self.app(scope, body.receive, send_headers)
            finally:
                body.release()

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        """Return the response to a request for another host or from another origin, or None."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self.hosts.allows(hosts[0].lower()):
            return PlainTextResponse(HOST_REFUSED, 421)
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            return None
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return PlainTextResponse(ORIGIN_REFUSED, 403)
        return None

    async def _session(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.num_sessions >= self.limits.sessions:
            await PlainTextResponse(SESSIONS_FULL, 503)(scope, receive, send)
            return
        self.num_sessions += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_sessions -= 1


class _Body:
    """The body of one request. Its bytes count as unfinished until `release`.

    `receive` raises HTTPException for a refused body. Starlette turns it into a response.
    """

    def __init__(self, guard: Guard, receive: Receive, announced: str) -> None:
        self._guard, self._receive = guard, receive
        self._announced = int(announced) if announced.isdecimal() else 0
        self._num_bytes = 0
        self._complete = False
        self._deadline_s = asyncio.get_running_loop().time() + guard.limits.body_s

    async def receive(self) -> Message:
        if self._complete:  # the only further message is that the client disconnected
            return await self._receive()
        message = await self._next()
        limit = self._guard.limits.uploads_bytes
        size = max(len(message.get("body", b"")), self._announced if self._num_bytes == 0 else 0)
        if self._guard.unfinished_bytes + size > limit:
            self.release()
            while not self._complete:  # a browser reads the response only after it has sent the body
                await self._next()
            raise HTTPException(503, UPLOADS_FULL, {"Retry-After": "60", "Connection": "close"})
        self._count(len(message.get("body", b"")))
        return message

    async def _next(self) -> Message:
        now_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._guard.limits.idle_s, self._deadline_s - now_s)):
                message = await self._receive()
        except TimeoutError:
            self._complete = True
            raise HTTPException(408, UPLOAD_SLOW, {"Connection": "close"}) from None
        self._complete = not message.get("more_body", False)
        return message

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._guard.unfinished_bytes += num_bytes

    def release(self) -> None:
        """Stop counting the bytes as unfinished."""
        self._count(-self._num_bytes)
