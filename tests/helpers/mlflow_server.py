"""A real MLflow server on this machine, and a proxy that injects network and server faults."""

import contextlib
import http.client
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from helpers.commands import free_port
from mura_dist.training.mlflow_reader import ENVIRONMENT

Fault = str
"""ok, refuse (never forwarded), lose (forwarded, the answer is lost), 500 or hang."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve MLflow from a database and artifacts in `folder`; yield its address."""
    address, log = f"http://127.0.0.1:{(port := free_port())}", folder / "server.log"
    arguments = ("--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", folder / "artifacts")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        1,
        *arguments,
    ]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT}
        )
    try:
        end = time.monotonic() + 120
        while not _is_healthy(address):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Proxy:
    """Proxy to `server` that applies `fault()` to each request and records the `authorization` header of each."""

    def __init__(self, server: str, fault: Callable[[], Fault]) -> None:
        self.authorization: list[str | None] = []
        proxy, host = self, server.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.authorization.append(self.headers.get("Authorization"))
                kind = fault()
                if kind == "hang":
                    time.sleep(60)
                if kind in ("refuse", "hang"):
                    self.close_connection = True
                    return
                status, content = (500, b"") if kind == "500" else self._forward(body)
                if kind == "lose":
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _forward(self, body: bytes) -> tuple[int, bytes]:
                connection = http.client.HTTPConnection(host, timeout=60)
                headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                return answer.status, content

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Proxy":
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
