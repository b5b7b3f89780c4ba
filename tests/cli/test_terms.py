"""Test the terms of use: each command that writes data, a model, metrics or predictions prints them once, last, on stderr."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.commands import BIN, NO_GPU, SHORT, TINY, free_port, run, torchrun
from helpers.models import card_of, with_card

from mura_dist.cli.main import cli
from mura_dist.data import mura
from mura_dist.data.phantoms import MARK

WITH_TERMS = {"shards", "train", "ensemble", "evaluate", "score", "export", "predict", "page"}
WITHOUT_TERMS = {"phantoms", "verify", "describe", "bench"}


def has_terms(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that the terms are the last line of stderr, once. On stdout they are only in the metrics.json that score prints."""
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(mura.TERMS) == 1
    assert [line for line in done.stdout.splitlines() if mura.TERMS in line and '  "terms": ' not in line] == []
    assert done.stderr.splitlines()[-1] == mura.TERMS, done.stderr


def test_every_command_has_a_policy_for_the_terms() -> None:
    assert set(cli.commands) == WITH_TERMS | WITHOUT_TERMS
    declared = {name for name, command in cli.commands.items() if command.terms}  # type: ignore[attr-defined]
    assert declared == WITH_TERMS - {"page"}, "the page prints them once it listens"


@dataclass(frozen=True)
class CommandPaths:
    """Inputs of the commands and their output folder."""

    data: Path
    shards: Path
    untrained: Path
    trained: Path
    out: Path


COMMANDS: dict[str, Callable[[CommandPaths], list[object]]] = {
    "shards": lambda at: ["shards", at.data, at.out / "s", "--size", "32"],
    "train": lambda at: ["train", *TINY, "epochs=0", f"shards={at.shards}", f"run={at.out / 'r'}"],
    "ensemble": lambda at: ["ensemble", at.trained, "--out", at.out / "list.json", "--top", "1"],
    "evaluate": lambda at: ["evaluate", at.untrained, at.shards, "--out", at.out / "e", "--no-gallery"],
    "score": lambda at: ["score", at.out / "e" / "studies.csv", at.data / "valid_labeled_studies.csv"],
    "score --json": lambda at: ["score", at.out / "e" / "studies.csv", at.data / "valid_labeled_studies.csv", "--json"],
    "export": lambda at: ["export", at.untrained, "--out", at.out / "m.onnx"],
    "evaluate model.onnx": lambda at: ["evaluate", at.out / "m.onnx", at.shards, "--out", at.out / "o", "--no-gallery"],
    "predict": lambda at: ["predict", at.out / "m.onnx", at.data / "valid", "--out", at.out / "p"],
}


@pytest.mark.slow
def test_commands_print_the_terms_once_and_last(
    phantoms: Path, halved: Path, untrained: Path, reference_run: Callable[..., Path], tmp_path: Path
) -> None:
    """In order, since some commands read the output of others. With --quiet, the terms are all of stderr."""
    at = CommandPaths(phantoms, halved, untrained, reference_run(1, *SHORT), tmp_path)
    for arguments in COMMANDS.values():
        has_terms(run("mura-dist", *arguments(at)))
    for name in ("train", "predict", "score"):
        quiet = run("mura-dist", *COMMANDS[name](at), "--quiet")
        has_terms(quiet)
        assert quiet.stderr == f"{mura.TERMS}\n", name
    done = run("mura-dist", "verify", halved)
    assert (done.returncode, mura.TERMS in done.stdout + done.stderr) == (0, False)


def test_terms_are_not_printed_when_the_caller_prints_them(phantoms: Path, tmp_path: Path) -> None:
    done = run("mura-dist", "shards", phantoms, tmp_path / "s", "--size", "32", env={"MURA_DIST_TERMS": "end"})
    assert (done.returncode, mura.TERMS in done.stdout + done.stderr) == (0, False)


def test_failed_command_prints_its_error_only(tmp_path: Path) -> None:
    done = run("mura-dist", "predict", tmp_path / "none.onnx", tmp_path, "--out", tmp_path / "p")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert mura.TERMS not in done.stderr


@pytest.mark.slow
def test_rank_0_alone_prints_the_terms(model: Path, phantoms: Path, tmp_path: Path) -> None:
    done = torchrun(3, "mura_dist.predict", model, phantoms / "valid", "--out", tmp_path / "p", "--quiet")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(mura.TERMS) == 1 == done.stderr.count(mura.TERMS)


@pytest.mark.slow
@pytest.mark.parametrize("known_drawings", [None, True, False])
def test_page_prints_the_terms_once_it_listens(
    model: Path, phantoms: Path, tmp_path: Path, known_drawings: bool | None
) -> None:
    """Without examples, with some, and with a warning that no example is a known drawing."""
    pytest.importorskip("streamlit")
    trained_on_phantoms, arguments = with_card(model, card_of(kind="phantoms"), tmp_path / "model.onnx"), []
    if known_drawings is not None:
        study_type = next((phantoms / "valid").iterdir()).name
        shutil.copytree(phantoms / "valid" / study_type, tmp_path / "valid" / study_type)
        if known_drawings:
            shutil.copy(phantoms / MARK, tmp_path)
        arguments = ["--examples", str(tmp_path)]
    port, out = free_port(), tmp_path / "stdout"
    command = [str(BIN / "mura-dist"), "page", str(trained_on_phantoms), "--port", str(port), *arguments]
    with (
        out.open("w") as stdout,
        subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, env={**os.environ, **NO_GPU}
        ) as process,
    ):
        assert process.stderr is not None
        assert process.stderr.readline() == f"{mura.TERMS}\n"
        before = out.read_text().splitlines()
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        process.send_signal(signal.SIGINT)
        try:
            _, more = process.communicate(timeout=60)
        finally:
            process.kill()
    assert before[0] == f"the page: http://127.0.0.1:{port}   (stop with Ctrl-C)"
    assert [line[:30] for line in before[1:]] == ["no example is a known drawing "] * (known_drawings is False)
    assert out.read_text().splitlines() == before
    assert mura.TERMS not in more
