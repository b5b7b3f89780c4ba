"""tools/: the fuzz run, the kill runs and the scarce run, each short; their own docstrings give the long ones.

That they would notice is tested first: on readers that misbehave, on folders that differ.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, run
from helpers.tools import tool

fuzzing, killing = tool("robustness/fuzz_radiograph"), tool("robustness/kill_conversion")
ranks = tool("robustness/kill_ranks")
sys.modules["kill_conversion"] = killing  # as a script beside it imports it
commands = tool("robustness/kill_commands")
sys.modules["kill_commands"] = commands
scarcity = tool("robustness/scarce_resources")

# ---- fuzz_radiograph.py

GOOD = "{'verdict': 'read', 's': 0.01, 'bytes': 1000}"
READER = """
import json, os, sys, time
for number, line in enumerate(sys.stdin):
    with open(line.rstrip("\\n"), "rb") as file:
        bad = file.read(3) == b"BAD"
    answer = {good}
    if bad:
        {what}
    print(json.dumps(answer), flush=True)
"""
MISDEEDS = {
    "os.abort()": "the process exited with status -6",
    "os._exit(0)": "the process exited with status 0",
    "time.sleep(60)": "hangs",
    "print('TIFFRead: error', file=sys.stderr, flush=True)": "noise on stderr: TIFFRead: error",
    "answer['s'] = 5.1": "took 5.1 s",
    "answer['bytes'] = 3 << 30": "took 3072 MiB",
    "answer['verdict'] = 'raised ValueError: bad'": "raised ValueError: bad",
}


@pytest.mark.parametrize("what", MISDEEDS)
def test_a_misdeed_is_found_and_the_next_file_meets_a_fresh_child(what: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(b"GOOD")
    bad.write_bytes(b"BAD")
    command = [sys.executable, "-c", READER.format(good=GOOD, what=what)]
    with fuzzing.Child(tmp_path, command, patience_s=1.0) as reader:
        verdicts = [reader.check(path)[0] for path in (good, bad, good)]
    assert (verdicts[0], verdicts[2]) == ("read", "read")
    assert verdicts[1].startswith(MISDEEDS[what])


@pytest.mark.slow
def test_a_finding_is_kept_and_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER.format(good=GOOD, what="os.abort()")]
    log_lines: list[str] = []
    outcome = fuzzing.fuzz({"bad": b"BAD" * 9}, 40, 0, keep=tmp_path / "kept", log=log_lines.append, command=command)
    assert len(outcome.findings) == len(log_lines) == len(list((tmp_path / "kept").iterdir())) > 0
    assert outcome.counts["read"] + len(outcome.findings) == outcome.num_files == 40
    for path in (tmp_path / "kept").iterdir():
        assert path.read_bytes().startswith(b"BAD")
        assert any(line.endswith(f"kept as {path}") for line in log_lines)
    assert f"{len(outcome.findings)} findings" in fuzzing.summary(outcome, 1.0)


@pytest.fixture(scope="module")
def seeds() -> dict[str, bytes]:
    return dict(fuzzing.build_seeds())


def test_mended_checksums_are_right_ones(seeds: dict[str, bytes]) -> None:
    reference = seeds["gray png"]
    broken = reference[:45] + b"xxxx" + reference[49:]
    assert fuzzing.fix_checksums(reference) == reference
    assert fuzzing.fix_checksums(broken) != broken
    assert b"".join(fuzzing._chunk(*chunk) for chunk in fuzzing._chunks(broken)) == fuzzing.fix_checksums(broken)[8:]
    assert fuzzing.fix_checksums(seeds["dicom"]) == seeds["dicom"]


def test_every_blow_changes_some_file(seeds: dict[str, bytes]) -> None:
    for kind in fuzzing.MUTATIONS:
        mutation = fuzzing.Mutation(kind, at=30_000, number=7, payload=b"\x13\x14", donor="jpeg", donor_at=20_000)
        cases = (fuzzing.Case(name, (mutation,), keep_header=False, fix_checksums=False) for name in seeds)
        assert any(case.data(seeds) != seeds[case.name] for case in cases), kind


@pytest.mark.nightly(part="fuzz")
def test_300_broken_files(seeds: dict[str, bytes], tmp_path: Path) -> None:
    """Twice: the same cases, the same outcome. 20,000: python tools/robustness/fuzz_radiograph.py"""
    log_lines: list[str] = []
    first, again = (fuzzing.fuzz(seeds, 300, 0, keep=tmp_path / "kept", log=log_lines.append) for _ in range(2))
    assert log_lines == []
    assert first.num_files == sum(first.counts[verdict] for verdict in fuzzing.VERDICTS) == 300
    assert first.counts["read"] >= 15, "some must come through, or the decoders were never reached"
    assert first.counts["unreadable"] >= 50
    assert (first.digest, first.counts) == (again.digest, again.counts)
    assert fuzzing.build_seeds() == seeds
    assert (
        fuzzing.fuzz(seeds, 20, 1, log=log_lines.append).digest
        != fuzzing.fuzz(seeds, 20, 2, log=log_lines.append).digest
    )


def test_the_fuzz_command(tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run("python", ROOT / "tools/robustness/fuzz_radiograph.py", "--files", 30, "--seeds", tmp_path / "seeds")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("30 files in ")
    assert "; 0 findings; " in done.stdout
    for arguments, text in (
        (["--files", 0], "--files 0 is less than 1"),
        (["--seeds", "none"], "none is not a folder"),
    ):
        refused = run("python", ROOT / "tools/robustness/fuzz_radiograph.py", *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert text in refused.stderr


# ---- kill_conversion.py


def test_differences_are_told(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "other"
    (first / "a").mkdir(parents=True)
    for name in ("same", "changed", "a/missing", "conversion.json"):
        (first / name).write_text(name)
    shutil.copytree(first, second)
    assert killing.differences(first, second) == []
    (second / "changed").write_text("CHANGED")
    (second / "a/missing").rename(second / "left")
    (second / "conversion.json").unlink()
    assert killing.differences(first, second) == ["a/missing is missing", "left is left over", "changed differs"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_survivors_are_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(killing, "GONE_S", 0.3)
    code = "import os, time\nos.fork()\ntime.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        while len(killing._group(process.pid)) < 2:
            assert process.poll() is None
        process.kill()
        process.wait()
        assert killing._survivors(process.pid) == "1 processes outlived the kill by 0 s"
        assert killing._survivors(process.pid) == ""
    assert killing._group(os.getpgid(0)), "we ourselves are alive"


# ---- kill_ranks.py


def test_what_a_disturbance_changed_is_found(tmp_path: Path) -> None:
    """A command that writes other bytes, or nothing, or leaves with another status, is a problem."""
    reference, work = tmp_path / "whole", ranks.Work((), (), "plan", but=("plan",))
    reference.mkdir()
    (reference / "same").write_text("same")
    script = tmp_path / "command"
    outcomes = {"mkdir $OUT; echo -n same > $OUT/same": [], "mkdir $OUT; touch $OUT/same": ["same differs"]}
    outcomes |= {"exit 3": ["failed: ", "same differs"]}
    for number, (line, problems) in enumerate(outcomes.items()):
        script.write_text(f"#!/bin/sh\nfor OUT; do :; done; OUT={tmp_path}/{number}; test -d $OUT && exit; {line}\n")
        script.chmod(0o755)
        trial = ranks.Trial("second start", 0.3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks.Work, "command", lambda self, out, size: [str(script)])
            ranks.attempt(work, reference, tmp_path / str(number), 2, trial)
        assert trial.problems == problems, line


@pytest.mark.nightly(part="kills")
@pytest.mark.parametrize("what", ["conversion", "prediction"])
def test_killed_ranks_end_with_the_same_bytes(what: str, tmp_path: Path) -> None:
    """10: python tools/robustness/kill_ranks.py conversion, and prediction"""
    arguments = ("--trials", 5, "--studies", 300, "--keep", tmp_path / "work")
    done = run("python", ranks.__file__, what, *arguments, timeout_s=1200)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith(": 5 the same bytes, 0 not")


# ---- kill_commands.py


def test_contents_differ_in_all_but_the_clock(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.json").write_text('{"kappa": 0.5}')
        (folder / "report.json").write_text('{"auroc": 0.9, "run": [{"seconds": 1.5}]}')
        (folder / "metrics.jsonl").write_text('{"step": 1, "time_s": 2}\n{"step": 2, "time_s": 3}\n')
    (folders[1] / "metrics.jsonl").write_text('{"step": 1, "time_s": 4}\n{"step": 2, "time_s": 5}\n')
    (folders[1] / "report.json").write_text('{"auroc": 0.9, "run": [{"seconds": 2.5}]}')
    (folders[2] / "report.json").write_text('{"auroc": 0.8, "run": [{"seconds": 1.5}]}')
    (folders[3] / "metrics.json").write_text('{"kappa": 0.4}')
    (folders[4] / "metrics.jsonl").write_text('{"step": 1, "time_s": 2}\n')
    reference, *rest = (dict(commands.contents(folder)) for folder in folders)
    assert [reference == contents for contents in rest] == [True, False, False, False]


@pytest.mark.nightly(part="kills")
def test_killed_commands_end_with_the_same_files(tmp_path: Path) -> None:
    """12: python tools/robustness/kill_commands.py"""
    done = run("python", commands.__file__, "--kills", 1, "--keep", tmp_path / "work", timeout_s=1200)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "4 kills at work: 4 the same files, 0 not"


@pytest.mark.nightly(part="kills")
def test_three_killed_conversions_end_with_the_same_bytes(phantoms: Path, tmp_path: Path) -> None:
    """20: python tools/robustness/kill_conversion.py"""
    log_lines: list[str] = []
    flags = ("--size", "64", "--workers", "2")
    stories = killing.kill_often(phantoms, tmp_path, flags, kills=3, seed=0, log=log_lines.append)
    assert [story.problems for story in stories] == [()] * 3, log_lines
    assert len(log_lines) == 4
    assert {story.group for story in stories} == {True, False}
    assert all(story.finished < len(story.moments_s) for story in stories), "each was killed at work once at least"


def test_a_conversion_that_fails_is_told(tmp_path: Path) -> None:
    done = run(
        "python",
        ROOT / "tools/robustness/kill_conversion.py",
        "--source",
        tmp_path / "none",
        "--keep",
        tmp_path / "work",
    )
    assert done.returncode == 1
    assert "the undisturbed conversion exited with status 2: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "work/left").touch()
    refused = run("python", ROOT / "tools/robustness/kill_conversion.py", "--keep", tmp_path / "work")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not empty. Name a new folder." in refused.stderr


# ---- scarce_resources.py


@pytest.mark.parametrize(
    ("status", "stderr", "fault"),
    [
        (0, "a\n" * 9, ""),
        (1, "mura-dist: No space left on device\n", ""),
        (3, "a\n" * 5, ""),
        (2, "a\n" * 6, "status 2, 6 lines on stderr"),
        (1, "", "status 1, 0 lines on stderr"),
        (1, "Traceback (most recent call last):\nOSError\n", "status 1, 2 lines on stderr"),
        (-9, "", "exited with status -9"),
        (None, "", "did not exit within 300 s"),
    ],
)
def test_end_of_a_limited_command_is_judged(status: int | None, stderr: str, fault: str) -> None:
    assert scarcity.End(status, stderr).fault.partition(":")[0] == fault


def test_differences_of_limited_commands_are_named() -> None:
    reference, after = {"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "b": b"0", "d.tmp": b""}
    assert scarcity.differences(reference, reference) == []
    assert scarcity.differences(reference, after) == ["c is missing", "d.tmp is left over", "b differs"]


def test_unknown_case_is_refused() -> None:
    refused = run("python", ROOT / "tools/robustness/scarce_resources.py", "clock", "disk-50")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "disk-50: unknown. Name some of disk-10, " in refused.stderr


def test_wall_clock_jumps_and_monotonic_clock_does_not(tmp_path: Path) -> None:
    library = scarcity.compile_clock(tmp_path)
    if library is None:
        pytest.skip("the clock is a library for Linux that needs a C compiler (cc)")
    code = """if True:
        import datetime, time
        monotonic_s, walls_s = time.monotonic(), []
        for _ in range(100):
            walls_s += [time.time(), datetime.datetime.now().timestamp()]
            time.sleep(0.002)
        steps_s = [after - before for before, after in zip(walls_s, walls_s[1:])]
        print(max(steps_s) > 3000, min(steps_s) < -3000, time.monotonic() - monotonic_s < 60)
    """
    env = {"LD_PRELOAD": str(library), "CLOCK_JUMPS_PERIOD_MS": "5"}
    assert run("python", "-c", code, env=env, cold=True).stdout == "True True True\n"


@pytest.mark.nightly(part="files")
def test_commands_end_well_under_scarce_resources() -> None:
    """All cases and commands: python tools/robustness/scarce_resources.py"""
    names = ("disk-10", "disk-80", "files-20", "shm", "clock", "shards", "predict", "score")
    script = ROOT / "tools/robustness/scarce_resources.py"
    done = run("python", script, *names, timeout_s=1800, cold=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    trials, verdict = done.stdout.splitlines()[-1].split(": ")
    assert verdict.endswith(" pass, 0 fail")
    assert int(trials.removesuffix(" trials")) + 3 * done.stdout.count("skipped, ") == 15
