"""The output folder of a prediction: its files, its plan, and how its ranks wait for each other.

    OUT/.parts/plan.json     plan: model, files, options; written first
        .parts/000000.json   predictions and failures of a chunk's files, one file per chunk; 000000.faults.json if I/O faults
                             kept files from being read, and 000000.retry.json once a start reads these again
        .parts/lock, rank-N  locks and heartbeats of the ranks: heartbeat.py
        README.txt           meaning of the tables' columns
        predict.json         summary and plan; written last, marks the prediction as complete

A prediction resumes only with the same plan. A plan that differs only in the version of the gate, whose values must not be mixed
in a table, repeats the chunks. A complete prediction stays.
"""

import contextlib
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
FAULTS, RETRY = ".faults", ".retry"  # suffixes of chunk results that are not final
GATE = "gate"  # key of the gate's version in the plan
PLAN_WAIT_S = 120.0  # time without a heartbeat of rank 0 before another rank gives up
_POLL_S = 0.2

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _ChunkResult(BaseModel):
    """A chunk's result on disk: see tables.ChunkResult and retries.py."""

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
    """The keys of predict.json that are read."""

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
    """The output folder of a prediction, and the rank of this process."""

    path: Path
    rank: int
    num_ranks: int

    @property
    def parts(self) -> Path:
        """Folder of the plan, the chunks and the locks."""
        return self.path / ".parts"

    @property
    def plan_path(self) -> Path:
        """File of the plan."""
        return self.path / PREDICT_PLAN

    @property
    def summary_path(self) -> Path:
        """File of the summary, which marks the prediction as complete."""
        return self.path / PREDICT_SUMMARY

    def chunk_path(self, number: int, suffix: str = "") -> Path:
        """Return the file of a chunk's result. `suffix` is FAULTS or RETRY, or empty for a final result."""
        return self.parts / f"{number:06d}{suffix}.json"

    def write_chunk(self, number: int, result: ChunkResult) -> None:
        """Write a chunk's result."""
        suffix = FAULTS if retries.FILES in result else ""
        content = json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
        files.write_bytes(self.chunk_path(number, suffix), content)

    def load_retry(self, number: int) -> ChunkResult | None:
        """Load the result of an earlier start that met I/O faults, or return None."""
        path = self.chunk_path(number, RETRY)
        return _load(path, _ChunkResult) if path.is_file() else None

    def missing_chunks(self, num_chunks: int) -> list[int]:
        """Return the numbers of the chunks, of all ranks, that have no result."""
        try:
            names = set(os.listdir(self.parts))
        except FileNotFoundError:
            if not self.summary_path.is_file():
                raise
            return []  # rank 0 has finished and cleaned up
        return [n for n in range(num_chunks) if not names & {self.chunk_path(n).name, self.chunk_path(n, FAULTS).name}]

    def load_plans(self) -> Iterator[dict[str, Any]]:
        """Yield the plans of the started and of the complete prediction; {} if missing."""
        for path in (self.plan_path, self.summary_path):
            content = _load(path, dict[str, Any]) if path.is_file() else {}
            plan = content.get("plan", content)
            yield plan if isinstance(plan, dict) else {}

    def load_chunks(self, num_chunks: int, stop: threading.Event) -> Iterator[ChunkResult]:
        """Yield the chunks' results in order. Raises StopRequestedError once `stop` is set."""
        for number in range(num_chunks):
            if stop.is_set():
                raise StopRequestedError("stopped while writing the tables. Nothing is lost. The same command resumes.")
            path = self.chunk_path(number)
            yield _load(path if path.is_file() else self.chunk_path(number, FAULTS), _ChunkResult)

    def locked(self, stop: threading.Event) -> contextlib.AbstractContextManager[None]:
        """Hold this rank's lock while the block runs. A start that does not get it leaves no trace."""
        what = (
            f"--out {self.path} (rank {self.rank} of {self.num_ranks})" if self.num_ranks > 1 else f"--out {self.path}"
        )
        options = LockOptions(what, "give another --out", heartbeat.LOCK_WAIT_S, lock.UNVERIFIED_WAIT_S)
        return heartbeat.join_folder(self.parts, self.rank, options, stop)

    def begin(self, plan: dict[str, Any], stop: threading.Event) -> dict[str, Any] | None:
        """Begin or resume the prediction. Rank 0 writes the plan, and the other ranks wait for it.

        Returns:
            The summary if the folder holds this prediction complete, else None.

        Raises:
            UserError: the folder holds a prediction with another plan.
            RunError: rank 0 did not begin in time.
            StopRequestedError: `stop` was set.
        """
        monitor = heartbeat.HeartbeatMonitor()
        while not self.summary_path.is_file() and not self._has_plan(plan):
            if self.rank == 0:
                self._write_plan(plan)
                break
            if monitor.seconds_since_beat(heartbeat.heartbeat_path(self.parts, 0)) > PLAN_WAIT_S:
                raise RunError(
                    f"rank {self.rank} of {self.num_ranks} waited {PLAN_WAIT_S:.0f} s for rank 0 to begin in {self.path}. "
                    "Look at the output of rank 0, and check that all ranks see the same folder."
                )
            wait_for_ranks(stop)
        if self.summary_path.is_file():
            summary = _load(self.summary_path, _Summary)
            self._compare(summary["plan"], {key: value for key, value in plan.items() if key != GATE})
            return summary
        self._compare(_load(self.plan_path, dict[str, Any]), plan)
        for stale in self.path.glob(".*.partial") if self.rank == 0 else ():  # of a run that was killed
            stale.unlink(missing_ok=True)
        self._begin_retries()
        return None

    def _has_plan(self, plan: dict[str, Any]) -> bool:
        """Return whether there is a plan that does not differ from this one in the gate's version alone."""
        if not self.plan_path.is_file():
            return False
        previous = _load(self.plan_path, dict[str, Any])
        return {key for key, value in plan.items() if previous.get(key) != value} != {GATE}

    def _write_plan(self, plan: dict[str, Any]) -> None:
        """Write the plan, after deleting the chunks of another version of the gate."""
        for path in self.parts.glob("[0-9]*.json"):
            path.unlink()
        files.write_json(self.plan_path, plan)

    def _begin_retries(self) -> None:
        """Mark chunks with I/O faults for a retry: those of this rank, on rank 0 all."""
        for path in self.parts.glob(f"*{FAULTS}.json"):
            number = int(path.name.partition(".")[0])
            if self.rank in (0, number % self.num_ranks):
                with contextlib.suppress(FileNotFoundError):  # another rank was faster
                    path.replace(self.chunk_path(number, RETRY))

    def finish(self, summary: dict[str, Any], readme: str) -> None:
        """Write README.txt, then predict.json. Raises RunError if another program has one of them open."""
        with tables.replacing_table(self.path / README):
            files.write_text(self.path / README, readme)
        with tables.replacing_table(self.summary_path):
            files.write_json(self.summary_path, summary)

    def clean(self) -> None:
        """Delete the chunks of a complete prediction. Called by rank 0, which holds the lock."""
        heartbeat.clear_folder(self.parts)

    def _compare(self, previous: dict[str, Any], plan: dict[str, Any]) -> None:
        for key, value in plan.items():
            if previous.get(key) != value:
                message = (
                    f"--out {self.path} holds a run with {key}={previous.get(key)}, this one has {key}={value}. "
                    "A run resumes only with the same plan: give another --out, or delete that folder."
                )
                raise RankLocalUserError(f"rank {self.rank}: {message}") if self.rank else UserError(message)


def refuse_foreign(out: Path) -> None:
    """Raise UserError if `out` holds tables, overlays or a README.txt, but no prediction to resume."""
    if "prediction" in find_output_kinds(out):
        return
    names = [f"{name}.{format}" for name in tables.NAMES for format in tables.FORMATS]
    if existing := [name for name in (*names, overlays.FOLDER, README) if (out / name).exists()]:
        raise UserError(f"--out {out} holds {existing[0]} of another origin. Give another folder, or move it away.")


def wait_for_ranks(stop: threading.Event) -> None:
    """Wait for a fraction of a second. Raises StopRequestedError if `stop` is set."""
    if stop.wait(_POLL_S):
        raise StopRequestedError("stopped while waiting for another rank. The same command resumes.")


def _load(path: Path, schema: Any) -> dict[str, Any]:
    content: dict[str, Any] = files.read_json(path, schema, remedy="give another --out, or delete that folder")
    return content
