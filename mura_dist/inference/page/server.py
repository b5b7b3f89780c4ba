"""The page: a doctor uploads a study and understands the answer. Streamlit, on the exported model alone; no torch.

    mura-dist page MODEL.onnx -> UserError, or serve: the model and the reading processes, once
    a request -> uvicorn (connection.py) -> guard.py -> Streamlit's application, changed by privacy.py
    each session, at each change of it: script.py -> app.show(PageContext)

Nothing uploaded reaches a disk or outlives its session, nothing is told to anybody, and it listens on this machine alone unless
told otherwise.
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
MAX_MESSAGE_BYTES = 1 << 20  # of a browser: what was clicked and typed; files come by HTTP
_NO_KNOWN_DRAWINGS = (
    "no example is a drawing of a set of this version: none is answered; draw one with mura-dist phantoms"
)
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True)
class PageContext:
    """What every session is shown from. `thumbnails`: a PNG of each example, None where it cannot be read."""

    service: InferenceService
    examples: tuple[Example, ...]
    thumbnails: tuple[bytes | None, ...]


_context: PageContext | None = None


def page_context() -> PageContext:
    """For script.py, which Streamlit runs in this very process."""
    assert _context is not None, "mura-dist page starts it"
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
    """Answer until it is interrupted.

    Args:
        model_path: The exported model.
        address: Where to listen.
        port: Where to listen.
        allow_host: Names by which browsers reach the page, beside `address`, localhost and IP addresses.
        examples: A folder in MURA's layout, whose studies may be chosen instead of uploading.
        announce: Called once, when browsers can connect, with what to print: the address first.

    Raises:
        UserError: The model, folder, address, port or a name cannot be used.
    """
    global _context
    studies = page_examples.find_examples(examples) if examples is not None else ()
    hosts = _hosts(address, allow_host)
    with _listen(address, port) as listener:
        model = OnnxModel.load(model_path)
        digests: frozenset[str] = frozenset()
        if examples is not None and model.card.of_drawings:
            digests = page_examples.drawing_digests(examples, studies)
        with _streamlit_home(), open_inference_service(model, min(2, num_processors()), digests) as shared:
            uploads = shared.read([example.content(0) for example in studies])
            _context = PageContext(shared, studies, tuple(map(page_examples.render_thumbnail, uploads)))
            privacy.apply_patches()
            bootstrap.load_config_options(_options())
            app = streamlit.App(Path(__file__).with_name("script.py"))
            lines = [f"the page: http://{_url_host(address)}:{port}   (Ctrl-C ends it)", *_warnings(address, hosts)]
            if studies and model.card.of_drawings and not digests:
                lines.append(_NO_KNOWN_DRAWINGS)
            server = _server(Guard(app, hosts, security_headers(_policy())))
            with signals.call_on_stop(partial(setattr, server, "should_exit", True)):
                announce(lines)
                server.run(sockets=[listener])


def _warnings(address: str, hosts: AllowedHosts) -> list[str]:
    """Return what to know of an address that others may reach."""
    if _is_loopback(address):
        return []
    names = ", ".join(sorted(hosts.names))
    return [
        f"anyone who reaches {address} can use it: no password, no encryption; leave --address out for this machine",
        f"it answers to IP addresses and to {names}; another name: --allow-host NAME",
    ]


@contextlib.contextmanager
def _streamlit_home() -> Iterator[None]:
    """Give Streamlit, which looks for its settings there, an empty home folder where the user has none."""
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
    """Streamlit's settings. Those that touch privacy are set whatever their default is, and whatever a config.toml says."""
    return {
        "server_headless": True,  # opens no browser, asks for no e-mail address
        "server_baseUrlPath": "",
        "server_maxUploadSize": MAX_UPLOAD_MB,
        "server_disconnectedSessionTTL": 2 * privacy.RECONNECT_S,  # which comes before
        "server_enableXsrfProtection": True,
        "server_enableCORS": True,
        "server_allowedHosts": [],  # the guard knows them
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
        # Streamlit's own is red, which says "wrong" beside a result. In each scheme: one for both would drop the dark one.
        "theme_light_primaryColor": "#1f6fb2",
        "theme_dark_primaryColor": "#61a8e8",
    }


def _hosts(address: str, more: Sequence[str]) -> AllowedHosts:
    """Return the names of the page: localhost, and where others may reach it this machine's own."""
    for name in more:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--allow-host {name}: not a host's name; give it without http:// and port, as in page.hospital.example"
            )
    own = [] if _is_loopback(address) else [address, socket.gethostname()]
    names = {name.lower().rstrip(".") for name in ("localhost", *own, *more)}
    return AllowedHosts(frozenset(name for name in names if not is_address(name)))


def _listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens there. Who connects before the server has started waits."""
    if not 1 <= port <= 65_535:
        raise UserError(f"--port {port}: must be 1 to 65535; {PORT} is the default")
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and address == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(place, family=family, backlog=2048, dualstack_ipv6=both)
    except PermissionError:
        raise UserError(f"--port {port}: not allowed to listen there; give one from 1024 on") from None
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--address {address} --port {port}: cannot listen there ({why.lower()}); give another --port, or an address "
            "of this machine"
        ) from None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _url_host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
