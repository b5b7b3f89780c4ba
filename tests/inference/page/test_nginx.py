"""Test the page behind launch/nginx.conf in Debian's nginx: TLS, login, WebSocket, path, and uploads kept in memory."""

import base64
import os
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers.commands import ROOT, free_port
from helpers.page import choose, chromium, served, until, upload

NAME, USER, PASSWORD = "page.hospital.example", "ward7", "a pass word"
EXAMPLE = ROOT / "launch" / "nginx.conf"
pytestmark = pytest.mark.nightly(part="system")


def nginx() -> str:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("no nginx here; on Debian: apt-get install nginx")
    return program


def run(*arguments: object) -> str:
    return subprocess.run([str(word) for word in arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return nginx's folder, with a certificate for NAME and a password for USER."""
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    arguments = ("-nodes", "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1")
    run(
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        *arguments,
        "-keyout",
        folder / "page.key",
        "-out",
        folder / "page.crt",
    )
    (folder / "page.users").write_text(f"{USER}:{run('openssl', 'passwd', '-6', PASSWORD)}")
    return folder


@pytest.fixture(scope="module")
def page_address(untrained: Path, phantoms: Path) -> Iterator[str]:
    with served(untrained / "model.onnx", "--allow-host", NAME, "--examples", phantoms) as (address, _):
        yield address


@pytest.fixture(scope="module")
def address(folder: Path, page_address: str) -> Iterator[str]:
    """Yield https://NAME:PORT/bones/ as served by the example, in which only ports and the file folder are changed."""
    program = nginx()
    port, plain = free_port(), free_port()
    text = EXAMPLE.read_text()
    for old, new in {
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "127.0.0.1:8501": urlsplit(page_address).netloc,
        "/etc/nginx/page.": f"{folder}/page.",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "page.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"  {kind}_temp_path {folder}/temporary/{kind};\n" for kind in kinds)
    (folder / "temporary").mkdir()
    user = "user root;\n" if os.geteuid() == 0 else ""  # nginx's user cannot enter pytest's folders
    (folder / "nginx.conf").write_text(
        f"{user}pid {folder}/pid;\nerror_log {folder}/error.log warn;\nevents {{}}\n"
        f"http {{\n  access_log off;\n{temporary}  include {folder}/page.conf;\n}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    result = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with subprocess.Popen([*command, "-g", "daemon off;"]) as process:
        until(lambda: status(f"https://127.0.0.1:{port}/bones/", folder) == 401)
        yield f"https://{NAME}:{port}/bones/"
        process.terminate()
    assert "[emerg]" not in (folder / "error.log").read_text()


def get(url: str, folder: Path, user: str = "", host: str = "") -> tuple[int, dict[str, str]]:
    """Return (status, headers) of a GET, or (0, {}) without a response."""
    context = ssl.create_default_context(cafile=folder / "page.crt")
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    get_request = urllib.request.Request(url, headers=headers | ({"Host": host} if host else {}))
    try:
        with urllib.request.urlopen(get_request, timeout=5, context=context) as reply:
            return reply.status, {name.lower(): value for name, value in reply.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}
    except OSError:
        return 0, {}


def status(url: str, folder: Path, **arguments: str) -> int:
    return get(url, folder, **arguments)[0]


def test_page_needs_the_password(address: str, folder: Path) -> None:
    ip_address = address.replace(NAME, "127.0.0.1")
    host = urlsplit(address).netloc
    for path in ("", "_stcore/health", "_stcore/stream", "media/x"):
        assert status(ip_address + path, folder, host=host) == 401, path
        assert status(ip_address + path, folder, host=host, user=f"{USER}:wrong") == 401, path
    code, headers = get(ip_address, folder, user=f"{USER}:{PASSWORD}", host=host)
    assert code == 200
    assert headers["x-frame-options"] == "DENY"
    assert headers["strict-transport-security"] == "max-age=31536000"
    assert status(f"{ip_address}_stcore/health", folder, user=f"{USER}:{PASSWORD}", host=host) == 200
    assert status(ip_address, folder, user=f"{USER}:{PASSWORD}", host="evil.example") == 421, "the page knows its names"


def test_study_through_nginx(address: str, folder: Path, phantoms: Path) -> None:
    """Log in, upload over TLS, and read the result by WebSocket. nginx writes no byte to temporary files."""
    from playwright.sync_api import sync_playwright

    views = sorted(next(path.parent for path in sorted(phantoms.rglob("image1.png"))).iterdir())
    large = folder / "large.tif"
    enlarge(views[0], large)
    arguments = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=arguments)
        context = browser.new_context(
            ignore_https_errors=True, http_credentials={"username": USER, "password": PASSWORD}
        )
        page = context.new_page()
        urls: list[str] = []
        sockets: list[Any] = []
        page.on("request", lambda request: urls.append(request.url))
        page.on("websocket", lambda opened: sockets.append(opened))
        page.goto(address.rstrip("/"))
        page.get_by_role("heading", level=1).wait_for(timeout=60_000)
        upload(page, *views, large)
        choose(page, "Study type", "Wrist")
        page.locator("section.outcome").wait_for(timeout=60_000)
        until(lambda: page.locator("img[alt^='Radiograph']").count() == len(views) + 1)
        with page.expect_download() as coming:
            page.get_by_role("button", name="Study (CSV)").click()
        assert Path(coming.value.path()).read_text().startswith("study,")
        assert [socket.url for socket in sockets] == [f"{address.replace('https', 'wss')}_stcore/stream"]
        assert [url for url in urls if not url.startswith((address.rstrip("/"), "data:", "blob:"))] == []
        browser.close()
    temporary_files = [path for path in (folder / "temporary").rglob("*") if path.is_file()]
    assert temporary_files == []
    assert "buffered to a temporary file" not in (folder / "error.log").read_text()


def enlarge(source: Path, target: Path) -> None:
    """Write a TIFF of 9 MB, which nginx would buffer on a disk by default."""
    from PIL import Image

    Image.open(source).convert("L").resize((3000, 3000)).save(target)
    assert target.stat().st_size > 8 << 20
