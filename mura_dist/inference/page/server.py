"""Serve the page: a user uploads a study and gets the model's result. Streamlit and the exported model, no torch.

    mura-dist page MODEL.onnx -> serve: loads the model, starts the worker processes
    a request -> uvicorn (connection.py) -> guard.py -> Streamlit, patched by privacy.py
    each change in a session -> script.py -> app.show(PageContext)

Uploads are never written to a disk and are deleted with their session. The page sends nothing to other servers. By default it
listens on this machine only.
"""

import contextlib
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import streamlit
import uvicorn
from streamlit.web import bootstrap

from mura_dist.core.errors import UserError
from mura_dist.distributed import signals
from mura_dist.distributed.processes import num_processors
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.page import examples as page_examples
from mura_dist.inference.page import privacy
from mura_dist.inference.page.connection import Connection
from mura_dist.inference.page.examples import Example
from mura_dist.inference.page.guard import AllowedHosts, Guard, content_security_policy, is_address, security_headers
from mura_dist.inference.page.study import MAX_UPLOAD_MB, InferenceService, open_inference_service

ADDRESS, PORT = "127.0.0.1", 8501
MAX_CONNECTIONS = 500  # 20 browsers open up to 140
MAX_MESSAGE_BYTES = 1 << 20  # of a WebSocket message: clicks and text; files come by HTTP
_NO_KNOWN_DRAWINGS = (
    "no example is a known drawing of this version, so none gets a result; draw examples with mura-dist phantoms"
)
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True)
class PageContext:
    """The data that all sessions share. thumbnails: a PNG of each example, or None where it cannot be read."""

    service: InferenceService
    examples: tuple[Example, ...]
    thumbnails: tuple[bytes | None, ...]


_context: PageContext | None = None


def page_context() -> PageContext:
    """Return the context of the running server, for script.py, which Streamlit runs in the same process."""
    assert _context is not None, "the server is not running"
    return _context


def serve(
    model_path: Path,
    *,
    address: str = ADDRESS,
    port: int = PORT,
    allow_host: Sequence[str] = (),
    examples: Path | None = None,
    announce: Callable[[list[str]], None] = lambda lines: None,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        model_path: The exported model.
        address: The address to listen on.
        port: The port to listen on.
        allow_host: Allowed host names, in addition to `address`, localhost and IP addresses.
        examples: A folder in MURA's layout. Its studies are offered as examples.
        announce: Called once, when browsers can connect, with lines to print. The first has the address.

    Raises:
        UserError: The model, the folder, the address, the port or a host name is not valid.
    """
    global _context
    studies = page_examples.find_examples(examples) if examples is not None else ()
    hosts = _hosts(address, allow_host)
    with _listen(address, port) as listener:
        model = OnnxModel.load(model_path)
        digests: frozenset[str] = frozenset()
        if examples is not None and model.card.trained_on_phantoms:
            digests = page_examples.drawing_digests(examples, studies)
        with _streamlit_home(), open_inference_service(model, min(2, num_processors()), digests) as shared:
            uploads = shared.read([example.content(0) for example in studies])
            _context = PageContext(shared, studies, tuple(map(page_examples.render_thumbnail, uploads)))
            privacy.apply_patches()
            bootstrap.load_config_options(_options())
            app = streamlit.App(Path(__file__).with_name("script.py"))
            lines = [f"the page: http://{_url_host(address)}:{port}   (stop with Ctrl-C)", *_warnings(address, hosts)]
            if studies and model.card.trained_on_phantoms and not digests:
                lines.append(_NO_KNOWN_DRAWINGS)
            server = _server(Guard(app, hosts, security_headers(_policy())))
            with signals.call_on_stop(partial(setattr, server, "should_exit", True)):
                announce(lines)
                server.run(sockets=[listener])


def _warnings(address: str, hosts: AllowedHosts) -> list[str]:
    """Return warnings for an address that other machines can reach."""
    if _is_loopback(address):
        return []
    names = ", ".join(sorted(hosts.names))
    return [
        f"anyone who can reach {address} can use the page: it has no password and no encryption. "
        "Omit --address to serve this machine only.",
        f"the allowed host names are IP addresses and {names}; add one with --allow-host NAME",
    ]


@contextlib.contextmanager
def _streamlit_home() -> Iterator[None]:
    """Give Streamlit an empty home folder if the user has none. Streamlit reads its settings there."""
    if os.path.expanduser("~") != "~":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder
        yield


def _server(app: Guard) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=30,
        ws_ping_timeout=30,
        lifespan="on",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
        proxy_headers=False,
        server_header=False,
        log_level="error",
        access_log=False,
    )
    return uvicorn.Server(config)


def _policy() -> str:
    return content_security_policy((Path(streamlit.__file__).parent / "static" / "index.html").read_text())


def _options() -> dict[str, Any]:
    """Return Streamlit's settings. They override its defaults and config.toml."""
    return {
        "server_headless": True,  # opens no browser, asks for no e-mail address
        "server_baseUrlPath": "",
        "server_maxUploadSize": MAX_UPLOAD_MB,
        "server_disconnectedSessionTTL": 2 * privacy.RECONNECT_S,  # privacy.py deletes the session earlier
        "server_enableXsrfProtection": True,
        "server_enableCORS": True,
        "server_allowedHosts": [],  # guard.py checks them
        "server_corsAllowedOrigins": [],
        "server_trustedUserHeaders": {},
        "server_enableStaticServing": False,
        "server_fileWatcherType": "none",
        "server_runOnSave": False,
        "server_enableAgentApi": False,
        "browser_gatherUsageStats": False,
        "client_toolbarMode": "minimal",
        "client_showErrorDetails": "none",  # an error's text could quote a file
        "client_showErrorLinks": False,
        "logger_hideWelcomeMessage": True,
        "global_developmentMode": False,
        # Streamlit's default is red, which suggests an error. A single color for both schemes would disable the dark one.
        "theme_light_primaryColor": "#1f6fb2",
        "theme_dark_primaryColor": "#61a8e8",
    }


def _hosts(address: str, more: Sequence[str]) -> AllowedHosts:
    """Return the allowed host names: localhost, `more`, and this machine's name if other machines can reach the page."""
    for name in more:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--allow-host {name}: not a host name. Give it without http:// and port, such as page.hospital.example."
            )
    own = [] if _is_loopback(address) else [address, socket.gethostname()]
    names = {name.lower().rstrip(".") for name in ("localhost", *own, *more)}
    return AllowedHosts(frozenset(name for name in names if not is_address(name)))


def _listen(address: str, port: int) -> socket.socket:
    """Return a listening socket. Connections wait until the server has started."""
    if not 1 <= port <= 65_535:
        raise UserError(f"--port {port}: must be 1 to 65535. The default is {PORT}.")
    try:
        family, *_, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and address == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(socket_address, family=family, backlog=2048, dualstack_ipv6=both)
    except PermissionError:
        raise UserError(
            f"--port {port}: no permission to listen on this port. Choose a port from 1024 to 65535."
        ) from None
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--address {address} --port {port}: cannot listen ({reason.lower()}). Choose another port, or an address of "
            "this machine."
        ) from None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _url_host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
