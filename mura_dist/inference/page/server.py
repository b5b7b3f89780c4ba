"""The page: a doctor uploads a study and understands the answer. Streamlit, on the exported model alone; no torch.

    mura-dist page MODEL.onnx -> Refusal, or serve: the model and the reading processes, once -> Streamlit's server
    each session, at each change of it: script.py -> app.show(Serving)

Nothing uploaded reaches a disk or outlives its session, nothing is told to anybody, and it listens on this machine alone unless
told otherwise.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mura_dist.core.errors import Refusal
from mura_dist.distributed.processes import processors
from mura_dist.inference.onnx_model import Model
from mura_dist.inference.page import privacy
from mura_dist.inference.page.examples import Example
from mura_dist.inference.page.study import MAX_UPLOAD_MB, Desk, desk

ADDRESS, PORT = "127.0.0.1", 8501


@dataclass(frozen=True)
class Serving:
    """What every session is shown from."""

    desk: Desk
    examples: tuple[Example, ...]


_serving: Serving | None = None


def serving() -> Serving:
    """For script.py, which Streamlit runs in this very process."""
    assert _serving is not None, "mura-dist page starts it"
    return _serving


def serve(
    model_path: Path,
    *,
    address: str = ADDRESS,
    port: int = PORT,
    examples: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Answer until it is interrupted. examples: a folder in MURA's layout, whose studies may be chosen instead of uploading.

    Raises Refusal for a model, folder, address or port that cannot be had.
    """
    global _serving
    from streamlit.web import bootstrap

    some = tuple(Example.find(examples)) if examples is not None else ()
    _check_place(address, port)
    model = Model.load(model_path)
    with _home(), desk(model, workers=min(2, processors())) as shared:
        _serving = Serving(shared, some)
        say(f"the page: http://{_spoken(address)}:{port}   (Ctrl-C ends it)")
        if not _is_loopback(address):
            say(
                f"anyone who reaches {address} can use it: no password, no encryption; leave --address out for this machine"
            )
        privacy.arrange()
        options = _options(address, port)
        bootstrap.load_config_options(options)
        bootstrap.run(str(Path(__file__).with_name("script.py")), False, [], options)


@contextlib.contextmanager
def _home() -> Iterator[None]:
    """Give Streamlit, which looks for its settings there, an empty home folder where the user has none."""
    if os.path.expanduser("~") != "~":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder
        yield


def _options(address: str, port: int) -> dict[str, Any]:
    """Streamlit's settings. Those that touch privacy are set whatever their default is, and whatever a config.toml says."""
    return {
        "server_address": address,
        "server_port": port,
        "server_headless": True,  # opens no browser, asks for no e-mail address
        "server_maxUploadSize": MAX_UPLOAD_MB,
        "server_disconnectedSessionTTL": 2 * privacy.GONE_S,  # which comes before
        "server_enableXsrfProtection": True,
        "server_enableCORS": True,
        # Against a web site that points its own name at this machine. Elsewhere nobody knows the names in use.
        "server_allowedHosts": ["localhost", "127.0.0.1", "::1", address] if _is_loopback(address) else [],
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


def _check_place(address: str, port: int) -> None:
    if not 1 <= port <= 65_535:
        raise Refusal(f"--port {port}: must be 1 to 65535; {PORT} is the default")
    try:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            if sys.platform != "win32":  # there it would let two servers share the port
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(where)
    except PermissionError:
        raise Refusal(f"--port {port}: not allowed to listen there; give one from 1024 on") from None
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise Refusal(
            f"--address {address} --port {port}: cannot listen there ({why}); give another --port, or an address of this machine"
        ) from None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _spoken(address: str) -> str:
    return f"[{address}]" if ":" in address else address
