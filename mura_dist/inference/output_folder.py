"""The folder that a prediction writes: what lies where, whether it is this prediction's, and how its ranks wait for each other.

    OUT/.parts/plan.json     what the prediction is: model, files, options; written first
        .parts/000000.json   the predictions and failures of a chunk's files, one file a chunk; 000000.faults.json where I/O
                             faults kept files from being read, and 000000.retry.json once a start reads these again
        .parts/lock, rank-N  who lives: heartbeat.py
        README.txt           what the columns of the tables mean
        predict.json         the summary, and the plan; written last: it says "done"

A prediction resumes only as it began: another plan in the same folder is refused. Where the plan differs in nothing but the
version of the gate, whose words must not be mixed in a table, the parts are made again. A finished prediction stays.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from mura_dist.core import files
from mura_dist.core.errors import RankLocalUserError, RunError, StopRequestedError, UserError
from mura_dist.data.folder_kind import PREDICT_PLAN, PREDICT_SUMMARY, find_output_kinds
from mura_dist.distributed import heartbeat, lock
from mura_dist.distributed.lock import LockOptions
from mura_dist.inference import overlays, retries, tables
from mura_dist.inference.tables import ChunkResult

README = "README.txt"
FAULTS, RETRY = ".faults", ".retry"  # in the names of parts that are not final
GATE = "gate"  # the plan's key of the version of the gate
PLAN_WAIT_S = 120.0  # how long a rank waits for a first one that shows no life
_POLL_S = 0.2


_Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Part(BaseModel):
    """A part on disk: see tables.Part and retries.py."""

    predictions: list[tuple[str, str, str, _Number, str]]
    failures: list[tuple[str, str, str]]
    overlays: dict[str, _Count]
    notes: dict[str, _Count] = {}


class _Decoding(BaseModel):
    files_per_s: _Number
    num_processes: _Count


class _Computing(BaseModel):
    radiographs_per_s: _Number


class _Throughput(BaseModel):
    limited_by: str
    decoding: _Decoding
    computing: _Computing


class _Summary(BaseModel):
    """The part of predict.json that is read."""

    num_files: _Count
    num_radiographs: _Count
    num_studies: _Count
    num_positive: _Count
    num_calls: _Count
    num_failures: _Count
    num_overlays: _Count
    num_overlays_withheld: _Count
    radiographs_by_note: dict[str, _Count] = {}
    warnings: list[str]
    seconds: _Number
    throughput: _Throughput | None = None
    plan: dict[str, Any]


@dataclass(frozen=True)
class OutputFolder:
    """Where a prediction is written, and which of its ranks this process is."""

    path: Path
    rank: int
    num_ranks: int

    @property
    def parts(self) -> Path:
        return self.path / ".parts"

    @property
    def plan(self) -> Path:
        return self.path / PREDICT_PLAN

    @property
    def done(self) -> Path:
        return self.path / PREDICT_SUMMARY

    def part(self, number: int, kind: str = "") -> Path:
        """Return the path of a chunk's part. `kind`: FAULTS or RETRY, else a part that is final."""
        return self.parts / f"{number:06d}{kind}.json"

    def write_part(self, number: int, part: ChunkResult) -> None:
        """Write a chunk's part, under the name that says whether it is final."""
        kind = FAULTS if retries.FILES in part else ""
        files.write_bytes(self.part(number, kind), json.dumps(part, ensure_ascii=False, allow_nan=False).encode())

    def retry(self, number: int) -> ChunkResult | None:
        """Load the part of an earlier start, some of whose files are to be read again; None where there is none."""
        path = self.part(number, RETRY)
        return _load(path, _Part) if path.is_file() else None

    def missing(self, num_chunks: int) -> list[int]:
        """List the chunks that nobody has tried to make, whoever is to."""
        try:
            names = set(os.listdir(self.parts))
        except FileNotFoundError:
            if not self.done.is_file():
                raise
            return []  # the first rank has finished, and tidied up
        return [n for n in range(num_chunks) if not names & {self.part(n).name, self.part(n, FAULTS).name}]

    def plans(self) -> Iterator[dict[str, Any]]:
        """Yield the plan of the prediction that began here, and of the one that is finished."""
        for path in (self.plan, self.done):
            content = _load(path, dict[str, Any]) if path.is_file() else {}
            plan = content.get("plan", content)
            yield plan if isinstance(plan, dict) else {}

    def load_parts(self, num_chunks: int, stop: threading.Event) -> Iterator[ChunkResult]:
        """Yield the parts in order. Raises StopRequestedError once `stop` is set."""
        for number in range(num_chunks):
            if stop.is_set():
                raise StopRequestedError("stopped while writing the tables; nothing is lost, the same command goes on")
            path = self.part(number)
            yield _load(path if path.is_file() else self.part(number, FAULTS), _Part)

    def locked(self, stop: threading.Event) -> contextlib.AbstractContextManager[None]:
        """Live in the folder while the block runs, as the only process of this rank. A refused start leaves no trace."""
        what = (
            f"--out {self.path} (rank {self.rank} of {self.num_ranks})" if self.num_ranks > 1 else f"--out {self.path}"
        )
        options = LockOptions(what, "give another --out", heartbeat.LOCK_WAIT_S, lock.UNVERIFIED_WAIT_S)
        return heartbeat.join_folder(self.parts, self.rank, options, stop)

    def begin(self, plan: dict[str, Any], stop: threading.Event) -> dict[str, Any] | None:
        """Return the summary where the folder holds this very prediction, finished; None where it is to be made.

        The first rank writes the plan, the others wait for it. Raises UserError for any other prediction.
        """
        monitor = heartbeat.HeartbeatMonitor()
        while not self.done.is_file() and not self._has_plan(plan):
            if self.rank == 0:
                self._write_plan(plan)
                break
            if monitor.seconds_since_beat(heartbeat.heartbeat_path(self.parts, 0)) > PLAN_WAIT_S:
                raise RunError(
                    f"rank {self.rank} of {self.num_ranks} waited {PLAN_WAIT_S:.0f} s for rank 0 to begin in {self.path}; "
                    "see what rank 0 says, and that all ranks see the same folder"
                )
            wait_for_ranks(stop)
        if self.done.is_file():
            summary = _load(self.done, _Summary)
            self._compare(summary["plan"], {key: value for key, value in plan.items() if key != GATE})
            return summary
        self._compare(_load(self.plan, dict[str, Any]), plan)
        for stale in self.path.glob(".*.partial") if self.rank == 0 else ():  # of a run that was killed
            stale.unlink(missing_ok=True)
        self._begin_retries()
        return None

    def _has_plan(self, plan: dict[str, Any]) -> bool:
        """Return whether there is a plan, other than this one with another version of the gate."""
        if not self.plan.is_file():
            return False
        before = _load(self.plan, dict[str, Any])
        return {key for key, value in plan.items() if before.get(key) != value} != {GATE}

    def _write_plan(self, plan: dict[str, Any]) -> None:
        """Write the plan. Parts that are there are of another version of the gate, and go first."""
        for part in self.parts.glob("[0-9]*.json"):
            part.unlink()
        files.write_json(self.plan, plan)

    def _begin_retries(self) -> None:
        """Make the chunks missing again that an earlier start could not read whole: this rank's, on the first rank all."""
        for path in self.parts.glob(f"*{FAULTS}.json"):
            number = int(path.name.partition(".")[0])
            if self.rank in (0, number % self.num_ranks):
                with contextlib.suppress(FileNotFoundError):  # another rank was faster
                    path.replace(self.part(number, RETRY))

    def finish(self, summary: dict[str, Any], readme: str) -> None:
        """Write README.txt, then predict.json. Raises RunError where another program holds one of them."""
        with tables.replacing_table(self.path / README):
            files.write_text(self.path / README, readme)
        with tables.replacing_table(self.done):
            files.write_json(self.done, summary)

    def clean(self) -> None:
        """Delete the parts of a finished prediction; called by the first rank, which has the lock."""
        heartbeat.clear_folder(self.parts)

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key, value in now.items():
            if before.get(key) != value:
                said = (
                    f"--out {self.path} holds a run with {key}={before.get(key)}, this one has {key}={value}; "
                    "a run goes on only as it began: give another --out, or delete that folder"
                )
                raise RankLocalUserError(f"rank {self.rank}: {said}") if self.rank else UserError(said)


def refuse_foreign(out: Path) -> None:
    """Raise UserError where `out` holds tables, overlays or a README.txt, and no prediction of ours that may go on."""
    if "prediction" in find_output_kinds(out):
        return
    names = [f"{name}.{format}" for name in tables.NAMES for format in tables.FORMATS]
    if found := [name for name in (*names, overlays.FOLDER, README) if (out / name).exists()]:
        raise UserError(f"--out {out} holds {found[0]}, which is not of this run; give another folder, or move it away")


def wait_for_ranks(stop: threading.Event) -> None:
    """Wait a moment for another rank. Raises StopRequestedError once `stop` is set."""
    if stop.wait(_POLL_S):
        raise StopRequestedError("stopped while waiting for another rank; the same command goes on")


def json_sha256(value: Any) -> str:
    """Compute the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _load(path: Path, schema: Any) -> dict[str, Any]:
    content: dict[str, Any] = files.read_json(path, schema, remedy="give another --out, or delete that folder")
    return content
