"""Test the injected errors: exactly these calls fail, as often as set."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.read_faults import ReadFaults

ATTEMPTS = """
import json, os, sys
def attempt(call):
    try:
        call()
        return 0
    except OSError as error:
        return error.errno
def pread(path):
    file = os.open(path, os.O_RDONLY)
    try:
        os.pread(file, 1, 0)
    finally:
        os.close(file)
bad, good = sys.argv[1:]
calls = [lambda: open(bad, "rb").read(), lambda: pread(bad), lambda: open(good, "rb").read()]
calls.append(lambda: os.listdir(os.path.dirname(bad)))
print(json.dumps([[attempt(call) for call in calls] for _ in range(2)]))
"""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"times": 3, "error": errno.ESTALE}, [[errno.ESTALE, errno.ESTALE, 0, 0], [errno.ESTALE, 0, 0, 0]]),
        (
            {"skip": 1, "call": "open", "error": errno.EMFILE},
            [[0, errno.EMFILE, 0, 0], [errno.EMFILE, errno.EMFILE, 0, 0]],
        ),
        ({"call": "list"}, [[0, 0, 0, errno.EIO]] * 2),
    ],
)
def test_only_the_selected_calls_fail(
    more: dict[str, int], expected: list[list[int]], tmp_path: Path, read_faults: Callable[..., ReadFaults]
) -> None:
    bad, good = tmp_path / "bad" / "image.png", tmp_path / "good.png"
    for path in (bad, good):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
    faults = read_faults(str(tmp_path / "bad"), **more)
    command = [sys.executable, "-c", ATTEMPTS, str(bad), str(good)]
    done = subprocess.run(command, env=os.environ | faults.environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected
    assert faults.num_calls >= sum(number != 0 for attempts in expected for number in attempts)
