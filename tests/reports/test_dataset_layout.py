"""Test describe's pages in Chromium: their length on a desktop, and no clipped text at any width."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import layout

from mura_dist.data import mura
from mura_dist.reports import dataset


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with layout.browser() as started:
        yield started


@pytest.fixture(scope="module", params=["folder", "shards"])
def described(
    request: pytest.FixtureRequest, phantoms: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("described") / "page.html"
    dataset.describe(phantoms if request.param == "folder" else shard_folder, out, with_contact_sheet=True)
    return out


def test_page_is_short_on_desktop(chromium: Any, described: Path) -> None:
    with layout.opened(chromium, described, layout.DESKTOP) as page:
        assert layout.height(page) <= 3000


@pytest.mark.parametrize("width", [layout.DESKTOP, layout.PHONE])
def test_no_text_is_clipped(chromium: Any, described: Path, width: int) -> None:
    for path in (described, dataset.contact_sheet_path(described)):
        with layout.opened(chromium, path, width) as page:
            assert layout.cut_text(page) == []
            layout.unfold(page)
            assert layout.cut_text(page) == []


def test_study_types_have_display_names(described: Path) -> None:
    for path in (described, dataset.contact_sheet_path(described)):
        text = path.read_text()
        for code in mura.STUDY_TYPES:
            assert f"{mura.display_name(code)}<small>{code}</small>" in text.replace(" <small>", "<small>")
            assert f">{code}<" not in text.replace(f"<small>{code}</small>", "")
