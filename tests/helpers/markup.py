"""A check for every page: names in the data change its text, never its elements, attributes or addresses."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from mura_dist.data.manifest import COLUMNS, Manifest
from mura_dist.data.mura import Radiograph

HOSTILE = (
    "</style></title></textarea></svg></figcaption><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    "' onmouseover='alert(3) --><!--]]> &lt;b&gt; &#60;i&#62; <svg onload=alert(4)> javascript:alert(5)"
    "\u202e\u2066\x07\x00{{7*7}}"
)
CONTROLS = set("\u202e\u2066\x07\x00")


class _Skeleton(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[tuple[str, ...]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = [
            value or "" for key, value in attrs if key in ("href", "src", "style", "id", "class", "d", "points")
        ]
        self.parts.append((tag, *(key for key, _ in attrs), *addresses))

    def handle_endtag(self, tag: str) -> None:
        self.parts.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.parts.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.parts.append(("declaration", decl))

    def unknown_decl(self, data: str) -> None:
        self.parts.append(("declaration", data))

    def handle_pi(self, data: str) -> None:
        self.parts.append(("instruction", data))


def check_names_are_text(write: Callable[[Callable[[str], str], Path], list[Path]], folder: Path) -> None:
    """Assert that hostile names create no markup.

    `write(rename, out)` returns pages of data with every name passed through `rename`. Harmless and hostile names have the same
    length and order, so that the pages do not differ otherwise.
    """
    pages = {}
    for kind, ending in (("harmless", "a" * len(HOSTILE)), ("hostile", HOSTILE)):
        (folder / kind).mkdir(parents=True)
        paths = write(lambda name, e=ending: name + e, folder / kind)
        pages[kind] = [(path.suffix, path.read_text("utf-8")) for path in paths]
    for (_, harmless), (suffix, hostile) in zip(pages["harmless"], pages["hostile"], strict=True):
        assert "alert(1)" in hostile or suffix != ".html", (
            "the page contains no hostile name, so the test would check nothing"
        )
        assert not CONTROLS & set(hostile)
        assert _Skeleton(hostile).parts == _Skeleton(harmless).parts


def renamed_shards(shards: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """Write a copy of a shard folder with renamed study types, patients, studies, paths, defects and files."""
    frame = Manifest.load(shards / "manifest.csv").frame
    for column in ("study_type", "patient", "study", "path"):
        frame[column] = frame[column].map(rename).astype(object)
    manifest = Manifest.from_radiographs(Radiograph(**line) for line in frame[list(COLUMNS[1:])].to_dict("records"))
    pd.testing.assert_series_equal(manifest.frame["label"], frame["label"])  # the order of the rows is unchanged
    target.mkdir()
    for path in shards.iterdir():
        (target / path.name).symlink_to(path)
    index = json.loads((shards / "index.json").read_bytes())
    index["manifest"]["sha256"] = manifest.digest
    index["defects"] = {rename("a defect"): [rename("train/x")]}
    index["unreadable"] = [{"row": 0, "path": rename("train/y"), "code": rename("too_large"), "reason": rename("why")}]
    for name, data in (("manifest.csv", manifest.to_csv()), ("index.json", json.dumps(index).encode())):
        (target / name).unlink()
        (target / name).write_bytes(data)
    return target
