"""Test the progress bar: it is visible on a terminal only, also while a stream is redirected."""

import contextlib
import io
import sys

import pytest

from mura_dist.cli.options import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "visible"), [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)]
)
@pytest.mark.parametrize("redirect", [contextlib.nullcontext, lambda: contextlib.redirect_stderr(io.StringIO())])
def test_progress_bar_is_visible_on_a_terminal_only(stream, quiet, visible, redirect, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr := stream())
    with progress_bar("counting", quiet) as progress, redirect():
        progress(3, 7)
    assert ("counting" in stderr.getvalue() and "3/7" in stderr.getvalue()) == visible
    assert visible or not stderr.getvalue()
