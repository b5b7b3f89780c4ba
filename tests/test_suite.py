"""Test the suite itself: a crashed worker costs one test, and every nightly test has its part."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT

CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import scheduling

def pytest_xdist_make_scheduler(config, log):
    return scheduling.LongestFirst(config, log)
"""
TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    if {crashes} and number == 2:
        os._exit(9)
"""


@pytest.mark.slow
def test_crashed_worker_fails_one_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for file in range(6):
        (tmp_path / f"test_{file}.py").write_text(TESTS.format(crashes=file == 3))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert "crashed while running 'test_3.py::test_it[2]'" in done.stdout, done.stdout
    assert "1 failed, 35 passed" in done.stdout


def test_every_nightly_test_belongs_to_a_part_of_the_nightly_script() -> None:
    script = (ROOT / "tests" / "nightly.sh").read_text()
    names = re.search(r"^parts=\((.*)\)$", script, re.MULTILINE)[1].split()  # type: ignore[index]
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    marks = [mark for text in texts for mark in re.findall(r"mark\.nightly\((.*?)\)", text)]
    assert len(marks) > 50
    assert set(marks) == {f'part="{name}"' for name in names}
