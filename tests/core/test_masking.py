"""Test that no secret of a URL is printed or stored, in any message, file or setting."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mura_dist.cli.main import INVALID, main
from mura_dist.core import config, storage
from mura_dist.core.errors import RunError, StopRequestedError, UserError, mask_url
from mura_dist.data.shards.convert import convert
from mura_dist.reports import dataset
from mura_dist.training.run import Run

SECRETS = ("AKIAEXAMPLEKEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCY", "hunter2", "sigsigsig", "wJalrXUtnFEMI", "bPxRfiCY")
KEY, SECRET = SECRETS[:2]
URLS = {
    f"s3://{KEY}:{SECRET}@bucket/shards": "s3://***@bucket/shards",
    f"s3://{KEY}:hunter2@bucket": "s3://***@bucket",
    f"memory://{KEY}@bucket/a": "memory://***@bucket/a",
    "https://user:hunter2@host:8443/a/b": "https://***@host:8443/a/b",
    "https://host/a?X-Amz-Signature=sigsigsig&X-Amz-Expires=9": "https://host/a?***",
    f"https://user:hunter2@host/a?token=sigsigsig#{KEY}=1": "https://***@host/a?***",
    "https://host/a#access_token=sigsigsig": "https://host/a#***",
    f"simplecache::s3://{KEY}:{SECRET}@bucket/a": "simplecache::s3://***@bucket/a",
    f"zip://a.png::s3://{KEY}:{SECRET}@bucket/a.zip": "zip://a.png::s3://***@bucket/a.zip",
    "sftp://user:hunter2@[::1]:22/a@2x": "sftp://***@[::1]:22/a@2x",
}
INNOCENT = (
    "s3://bucket/a@2x.png",
    "memory://a/b#c",
    "http://host:80/a@b",
    "http://[::1]:80/a@b",
    "file:///C:/x@y",
    "a@b:c/d?e=f",
    "://",
)


def check(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text], text


@pytest.mark.parametrize("url", URLS)
def test_secrets_of_a_url_are_masked(url: str) -> None:
    assert mask_url(url) == URLS[url] == mask_url(mask_url(url))
    text = f"cannot read {url}: it is gone; see '{url}', ({url}), <{url}>."
    masked = URLS[url]
    assert mask_url(text) == f"cannot read {masked}: it is gone; see '{masked}', ({masked}), <{masked}>."


@pytest.mark.parametrize("text", INNOCENT)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert mask_url(text) == text


@pytest.mark.parametrize("url", URLS)
def test_errors_recipes_status_and_output_hold_no_secret(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (UserError, RunError, StopRequestedError):
        check(str(error(f"{url}: no")) + repr(error(f"{url}: no")))
    settings = config.check({"shards": url, "run": str(tmp_path)}, "here")
    recipe = config.to_toml(settings)
    check(recipe)
    assert URLS[url] in recipe
    run = Run(tmp_path, settings)
    run.write_status("failed", reason=f"OSError: {url}: no")
    check((tmp_path / "status.json").read_text())
    check(
        json.dumps(config.identity(settings))
        + json.dumps(config.agreed(settings))
        + json.dumps(config.shareable(settings))
    )
    (tmp_path / "recipe.toml").write_text(recipe)
    loaded = config.load(tmp_path / "recipe.toml")
    assert config.identity(loaded) == config.identity(settings), "the identity of a run does not depend on secrets"
    with pytest.raises(UserError, match="the credentials are masked"):
        storage.open_storage(loaded.shards)
    assert main(["shards", url, url]) == INVALID
    assert main(["train", f"shards={url}", f"run={url}", "epochs=-1"]) == INVALID
    assert main(["verify", url, url]) == INVALID
    printed = capsys.readouterr()
    check(printed.out + printed.err)


class _Forbidding(http.server.BaseHTTPRequestHandler):
    """Server that refuses every request and repeats the path in the error."""

    def do_GET(self) -> None:
        self.send_error(403 if "403" in self.path else 404, self.path)

    do_HEAD = do_GET

    def log_message(self, *texts: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"user:hunter2@127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def raised(contents: list[bytes | OSError]) -> None:
    for content in contents:
        if isinstance(content, OSError):
            raise content


@pytest.mark.parametrize("path", ["403", "404", "403?token=sigsigsig", "404?token=sigsigsig"])
def test_messages_of_a_store_are_masked(
    path: str, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp")
    remote = storage.open_storage(f"http://{server}/{path}")
    check(str(remote))
    for act in (
        lambda: remote.read("a"),
        lambda: remote.read_range("a", 0, 9),
        lambda: remote.copy_to("a", tmp_path / "a"),
        lambda: raised(remote.read_many(["a"])),
    ):
        with pytest.raises((OSError, RunError)) as error:
            act()
        check(f"{error.value!r} {error.value} {error.value.__dict__}")
    assert main(["verify", f"http://{server}/{path}"]) != 0
    printed = capsys.readouterr()
    check(printed.out + printed.err)


@pytest.mark.slow
def test_conversion_stores_and_prints_no_secret(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = f"memory://{KEY}:hunter2@ward", f"memory://{KEY}:hunter2@shards"
    remote = storage.open_storage(source)
    for path in sorted((phantoms / "train").rglob("*.png"))[:40]:
        remote.write(path.relative_to(phantoms).as_posix(), path.read_bytes())
    assert main(["shards", source, out, "--size", "48", "--workers", "1", "--quiet"]) == 0
    convert(source, out, size=48, workers=1)
    dataset.describe(out, tmp_path / "a.html")
    dataset.describe(source, tmp_path / "b.html")
    loaded = [
        storage.open_storage(out).read(name)
        for name in ("index.json", "report.json", "conversion.json", "manifest.csv")
    ]
    loaded += [path.read_bytes() for path in tmp_path.iterdir()]
    for data in loaded:
        check(data.decode())
    printed = capsys.readouterr()
    check(printed.out + printed.err)
    assert "memory://***@shards: 48 px" in printed.out
