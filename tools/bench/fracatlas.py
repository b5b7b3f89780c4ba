"""Compare trainings on FracAtlas in MURA's layout: variants of a recipe over five folds, and a recipe with a plain loop on valid.

python tools/bench/fracatlas.py cut FOLDER OUT
python tools/bench/fracatlas.py folds OUT --variant "no-ema ema=0" --variant "160px size=160" [--set key=value ...]
python tools/bench/fracatlas.py final OUT [--seeds 0,1,2] [--plain fp32,bf16] [--hardware FILE.csv] [--set key=value ...]

    FOLDER -> cut: a patient's hash -> OUT/files/train, OUT/files/valid, and a fold for each patient of train -> OUT/cut.csv
    folds: per variant and fold   mura-dist train -> evaluate on the fold    -> a line of the results file -> paired comparison
    final: per seed               mura-dist train, plain_loop.py -> valid    -> a line of the results file -> tables

`folds` never reads valid. `final` reports valid alone. Each training is a process of its own. The same command resumes: a line of
the results file is not measured again, and an unfinished training continues. The results file holds the predictions, so that
another machine with the same cut continues it, and files of several machines can be joined. `--report` prints the tables of a
results file and trains nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mura_dist.core import config, files
from mura_dist.core.errors import UserError
from mura_dist.data.shards.convert import convert
from mura_dist.data.source.scan import scan
from mura_dist.metrics.classification import compute_auroc, compute_average_precision
from mura_dist.metrics.intervals import Bootstrap, Clusters, Interval
from mura_dist.training.run import environment

ROOT = Path(__file__).resolve().parents[2]
NUM_FOLDS = 5
BASELINE = "baseline"
PACKAGE = "mura_dist"
RESAMPLES = 2000
POLL_S = 5.0  # interval of writing a training's seconds
MIN_POSITIVES = 10  # of a study type that has a line of its own
METRICS = {"AUROC": compute_auroc, "average precision": compute_average_precision}


# ---- the cut


def patient_hash(patient: str) -> int:
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:6], "big")


def assign_folds(source: Path) -> pd.DataFrame:
    """Return the radiographs of a folder in MURA's layout with the fold of their patient, and -1 for valid.

    One patient in five is valid, by the SHA-256 of the name of the patient's folder. The folds of the others follow from the same
    hash. The split of the folder is ignored.

    Returns:
        Columns study (without its split), study_type, patient, label, fold, path.
    """
    frame = scan(source, duplicates=False).manifest.frame
    digit = frame["patient"].map(patient_hash)
    fold = np.where(digit % 5 == 0, -1, digit // 5 % NUM_FOLDS)
    frame = frame.assign(fold=fold, study=_without_split(frame["study"]))
    return frame[["study", "study_type", "patient", "label", "fold", "path"]]


def cut(source: Path, out: Path) -> pd.DataFrame:
    """Copy the radiographs of `source` to OUT/files/train and OUT/files/valid, and write OUT/cut.csv: a row per study."""
    frame = assign_folds(source)
    studies = frame.drop_duplicates("study").drop(columns="path").sort_values("study", ignore_index=True)
    text, path = studies.to_csv(index=False), out / "cut.csv"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds the cut of another folder. Give another OUT.")
    for name, fold in zip(frame["path"], frame["fold"], strict=True):
        target = out / "files" / ("valid" if fold < 0 else "train") / name.partition("/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(target, (source / name).read_bytes())
    files.write_text(path, text)
    return studies


def _without_split(study: pd.Series) -> pd.Series:
    return study.str.partition("/")[2]


def read_cut(out: Path) -> pd.DataFrame:
    path = out / "cut.csv"
    if not path.is_file():
        raise UserError(f"{out} has no cut.csv. Run fracatlas.py cut FOLDER {out} first.")
    return pd.read_csv(path)


def make_shards(out: Path, size: int, fold: int | None = None) -> Path:
    """Convert OUT/files, or its train folder with one fold as valid, unless that is done already."""
    folder = out / "shards" / (f"{size}px" if fold is None else f"{size}px-fold{fold}")
    if (folder / "index.json").is_file():
        return folder
    if fold is None:
        convert(out / "files", folder, size=size)
        return folder
    fold_of = read_cut(out).set_index("study")["fold"]
    with tempfile.TemporaryDirectory() as temporary:
        for study, study_fold in fold_of[fold_of >= 0].items():
            link = Path(temporary) / ("valid" if study_fold == fold else "train") / str(study)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((out / "files" / "train" / str(study)).resolve())
        convert(Path(temporary), folder, size=size)
    return folder


# ---- trainings


class Cost(NamedTuple):
    """The seconds of a training in all its starts, and their number."""

    seconds: float
    starts: int


def run_timed(command: Sequence[str | Path], folder: Path, threads: int) -> Cost:
    """Run a training to its end, and add up its seconds over all starts in FOLDER.cost.json.

    Raises:
        subprocess.CalledProcessError: It failed or was stopped. Its own message is on stderr.
    """
    record = folder.with_name(f"{folder.name}.cost.json")
    cost: dict[str, Any] = {"seconds": 0.0, "starts": 0, "done": False}
    if record.is_file():
        cost = json.loads(record.read_bytes())
    if not cost["done"]:
        record.parent.mkdir(parents=True, exist_ok=True)
        before, started = cost["seconds"], time.perf_counter()
        cost["starts"] += 1
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, env=environ)
        try:
            while not cost["done"]:
                try:
                    status = process.wait(POLL_S)
                    cost["done"] = status == 0
                except subprocess.TimeoutExpired:
                    status = None
                files.write_json(record, cost | {"seconds": before + time.perf_counter() - started})
                if status:
                    raise subprocess.CalledProcessError(status, [str(word) for word in command])
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        cost = json.loads(record.read_bytes())
    return Cost(cost["seconds"], cost["starts"])


@dataclass(frozen=True)
class Training:
    """A training that a line of the results file describes.

    Attributes:
        key: Fields that identify the line.
        settings: Settings that must not change under the same key.
        size: Pixels of a side.
        overrides: `key=value` arguments of mura-dist train.
    """

    key: dict[str, Any]
    settings: dict[str, Any]
    size: int
    overrides: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its folder. Other settings have another name."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return "-".join([*(str(value) for value in self.key.values()), digest[:8]]).replace(" ", "-")


@dataclass(frozen=True)
class Machine:
    """The ranks and the threads of each."""

    ranks: int
    threads: int


def describe(recipe: Path, overrides: Sequence[str], size: int) -> dict[str, Any]:
    """Return the settings that define a variant, without paths and seed. Raises UserError for a wrong setting."""
    settings = config.load(recipe, [*overrides, "shards=shards", "run=run"])
    return config.identity(settings) | {"epochs": settings.epochs, "size": size, "seed": None}


def train_package(
    training: Training, out: Path, shards: Path, recipe: Path, machine: Machine
) -> tuple[dict[str, float], Cost]:
    """Run `mura-dist train` and `evaluate`, and return the probability by study of valid."""
    run = out / "runs" / training.name
    arguments = [
        str(recipe),
        *training.overrides,
        f"shards={shards}",
        f"run={run}",
        f"seed={training.key['seed']}",
        "--quiet",
    ]
    command = [sys.executable, "-m", "mura_dist", "train", *arguments]
    if machine.ranks > 1:
        launcher = ["--standalone", "--nproc-per-node", str(machine.ranks), "-m", "mura_dist.train", "--"]
        command = [sys.executable, str(ROOT / "launch/torchrun.py"), *launcher, *arguments]
    cost = run_timed(command, run, machine.threads)
    report = out / "runs" / f"{training.name}-valid"
    evaluate = [sys.executable, "-m", "mura_dist", "evaluate", str(run), str(shards), "--out", str(report)]
    environ = os.environ | {"OMP_NUM_THREADS": str(machine.ranks * machine.threads)}
    subprocess.run([*evaluate, "--no-gallery", "--quiet"], check=True, stdout=subprocess.DEVNULL, env=environ)
    studies = pd.read_csv(report / "studies.csv")
    return _mean_by_study(_without_split(studies["study"]), studies["probability"]), cost


def train_plain(training: Training, out: Path, shards: Path, threads: int) -> tuple[dict[str, float], Cost]:
    """Run plain_loop.py, and return the probability by study of valid."""
    run = out / "runs" / training.name
    options = [f"--{name.replace('_', '-')}={value}" for name, value in training.settings.items() if name != "seed"]
    command = [
        sys.executable,
        str(ROOT / "tools/bench/plain_loop.py"),
        str(out / "files"),
        str(shards / "manifest.csv"),
    ]
    command += [str(run), *options, f"--seed={training.key['seed']}", f"--threads={threads}"]
    cost = run_timed(command, run, threads)
    predictions = pd.read_csv(run / "predictions.csv")
    study = _without_split(predictions["path"]).str.rpartition("/")[0]
    return _mean_by_study(study, predictions["probability"]), cost


def _mean_by_study(study: pd.Series, probability: pd.Series) -> dict[str, float]:
    return {str(name): float(value) for name, value in probability.groupby(study).mean().items()}


# ---- the results file


@dataclass(frozen=True)
class Results:
    """A file of JSON lines, one for each finished training."""

    path: Path

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind. Raises UserError where a line is not JSON."""
        text = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        lines = []
        for number, line in enumerate(text, 1):
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise UserError(
                    f"{self.path} line {number} is not JSON. Delete the line and run the command again."
                ) from None
        return [line for line in lines if line["key"]["kind"] == kind]

    def holds(self, training: Training) -> bool:
        """Return whether a training has a line. Raises UserError where a line has other settings under its name."""
        label = {name: value for name, value in training.key.items() if name in ("kind", "variant", "contender")}
        for line in self.lines(training.key["kind"]):
            if label.items() <= line["key"].items():
                for name in sorted(line["settings"].keys() | training.settings.keys()):
                    recorded, current = line["settings"].get(name), training.settings.get(name)
                    if recorded != current:
                        raise UserError(
                            f"{self.path}: {training.name} was measured with {name}={recorded}, this command has "
                            f"{name}={current}. Restore the value, or give another --results."
                        )
                if line["key"] == training.key:
                    return True
        return False

    def pending(self, trainings: Iterable[Training]) -> list[Training]:
        """Return the trainings without a line. Raises UserError as `holds`."""
        return [training for training in trainings if not self.holds(training)]

    def add(
        self, training: Training, studies: pd.DataFrame, probability: Mapping[str, float], cost: Cost, **facts: Any
    ) -> None:
        """Append a line."""
        vector = align(studies, probability)
        label = studies["label"].to_numpy()
        scores = {name: round(float(metric(label, vector)), 6) for name, metric in METRICS.items()}
        line = {"key": training.key, "settings": training.settings, **scores, "n": len(studies)}
        line |= {"seconds": round(cost.seconds, 1), "starts": cost.starts, **facts, "environment": environment()}
        line["probability"] = {name: float(f"{value:.7g}") for name, value in probability.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def align(studies: pd.DataFrame, probability: Mapping[str, float]) -> np.ndarray:
    """Return the probability of each study, float64 (n,). Raises UserError where one is missing."""
    vector = studies["study"].map(probability).to_numpy(np.float64)
    if np.isnan(vector).any():
        missing = studies["study"].to_numpy()[np.isnan(vector)]
        raise UserError(
            f"{len(missing)} studies of the cut have no prediction (first: {missing[0]}). Give the OUT that the results are of."
        )
    return vector


# ---- statistics


Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weight (R, n), how often each study is drawn, to (R,)."""


def estimate(studies: pd.DataFrame, statistics: Mapping[str, Statistic]) -> dict[str, tuple[float, Interval]]:
    """Return each statistic and its 95 % interval of a bootstrap over patients. All share the resamples."""

    def compute(weight: np.ndarray) -> dict[str, np.ndarray]:
        return {name: statistic(weight) for name, statistic in statistics.items()}

    clusters = Clusters.from_patients(studies["patient"].to_numpy(object))
    bootstrap = Bootstrap.run(clusters, studies["label"].to_numpy(), compute, resamples=RESAMPLES, seed=0)
    results = {}
    for name, value in compute(np.ones((1, len(studies)))).items():
        interval = bootstrap.interval(name)
        no_interval = Interval(float("nan"), float("nan"), "none")
        results[name] = float(value[0]), no_interval if isinstance(interval, str) else interval
    return results


def mean_metric(metric: Callable[..., np.ndarray], studies: pd.DataFrame, vectors: Sequence[np.ndarray]) -> Statistic:
    """Return the mean of a metric over several predictions of the same studies."""
    label = studies["label"].to_numpy()
    return lambda weight: np.mean([metric(label, vector, weight) for vector in vectors], axis=0)


def fold_metric(metric: Callable[..., np.ndarray], studies: pd.DataFrame, vector: np.ndarray) -> Statistic:
    """Return the mean over folds of a metric within the fold."""
    label, fold = studies["label"].to_numpy(), studies["fold"].to_numpy()
    masks = [fold == number for number in np.unique(fold)]
    return lambda weight: np.mean([metric(label[mask], vector[mask], weight[:, mask]) for mask in masks], axis=0)


def difference(a: Statistic, b: Statistic) -> Statistic:
    return lambda weight: a(weight) - b(weight)


def cell(value: tuple[float, Interval], sign: str = "") -> str:
    number, interval = value
    return f"{number:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


# ---- reports


def report_folds(cut_studies: pd.DataFrame, lines: list[dict[str, Any]]) -> str:
    """Return the table of variants, each against the baseline over the folds that both have."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_variant.setdefault(line["key"]["variant"], {})[line["key"]["fold"]] = line
    baseline = by_variant.get(BASELINE, {})
    rows = []
    for variant, folds in by_variant.items():
        cells = [variant, str(len(folds))]
        for name in METRICS:
            values = [line[name] for line in folds.values()]
            spread = f" (SD {np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        common = sorted(folds.keys() & baseline.keys()) if variant != BASELINE else []
        cells += _compare_with_baseline(cut_studies, folds, baseline, common) if common else [""] * 4
        rows.append([*cells, f"{np.mean([line['seconds'] for line in folds.values()]):.0f}"])
    header = ["variant", "folds", "AUROC, mean over folds", "average precision, mean over folds"]
    header += [
        "pooled AUROC - baseline's",
        "mean AUROC - baseline's",
        "pooled average precision - baseline's",
        "verdict",
    ]
    return table([*header, "s a fold"], rows)


def _compare_with_baseline(
    cut_studies: pd.DataFrame, folds: dict[int, dict], baseline: dict[int, dict], common: list[int]
) -> list[str]:
    """Return the differences over out-of-fold predictions, and whether the interval of the pooled AUROC's excludes 0."""
    studies = cut_studies[cut_studies["fold"].isin(common)]
    a, b = (
        align(studies, {name: value for fold in common for name, value in side[fold]["probability"].items()})
        for side in (folds, baseline)
    )
    values = estimate(
        studies,
        {
            "pooled": difference(*(mean_metric(compute_auroc, studies, [side]) for side in (a, b))),
            "mean": difference(*(fold_metric(compute_auroc, studies, side) for side in (a, b))),
            "precision": difference(*(mean_metric(compute_average_precision, studies, [side]) for side in (a, b))),
        },
    )
    interval = values["pooled"][1]
    verdict = "resolved" if interval.low > 0 or interval.high < 0 else "not resolved"
    if len(common) < NUM_FOLDS:
        verdict += f" ({len(common)} folds)"
    return [*(cell(value, "+") for value in values.values()), verdict]


class Side(NamedTuple):
    """The finished seeds of a contender on valid."""

    seeds: list[int]
    vectors: list[np.ndarray]
    seconds: list[float]


def read_sides(studies: pd.DataFrame, lines: list[dict[str, Any]]) -> dict[str, Side]:
    """Return the contenders of a results file, mura_dist first."""
    sides: dict[str, Side] = {}
    for line in sorted(
        lines, key=lambda line: (line["key"]["contender"] != PACKAGE, line["key"]["contender"], line["key"]["seed"])
    ):
        side = sides.setdefault(line["key"]["contender"], Side([], [], []))
        side.seeds.append(line["key"]["seed"])
        side.vectors.append(align(studies, line["probability"]))
        side.seconds.append(line["seconds"])
    return sides


def report_final(cut_studies: pd.DataFrame, lines: list[dict[str, Any]], hardware: Path | None) -> str:
    """Return the tables of seeds, of differences, of study types and of the shortcuts."""
    studies = cut_studies[cut_studies["fold"] < 0].reset_index(drop=True)
    sides = read_sides(studies, lines)
    positives = int(studies["label"].sum())
    parts = [
        f"valid: {len(studies)} studies, {positives} positive. Intervals: 95 %, bootstrap over patients.",
        _seed_table(studies, sides),
    ]
    if PACKAGE in sides and len(sides) > 1:
        parts += ["mura_dist - the plain loop:", _difference_table(studies, sides)]
    parts += ["AUROC by subgroup, mean over seeds:", _subgroup_table(studies, sides, _subgroups(studies, hardware))]
    parts += ["Scores without pixels:", _shortcut_table(cut_studies, studies, hardware)]
    return "\n\n".join(parts)


def _seed_table(studies: pd.DataFrame, sides: Mapping[str, Side]) -> str:
    rows = []
    for name, side in sides.items():
        groups = [(f"seed {seed}", [index]) for index, seed in enumerate(side.seeds)]
        if len(groups) > 1:
            groups.append((f"mean over {len(groups)} seeds", list(range(len(groups)))))
        for title, indices in groups:
            vectors = [side.vectors[index] for index in indices]
            values = estimate(studies, {key: mean_metric(metric, studies, vectors) for key, metric in METRICS.items()})
            seconds = np.mean([side.seconds[index] for index in indices])
            rows.append([name, title, *(cell(value) for value in values.values()), f"{seconds:.0f}"])
    return table(["contender", "", *METRICS, "training, s"], rows)


def _difference_table(studies: pd.DataFrame, sides: Mapping[str, Side]) -> str:
    """Return the paired differences per seed that both have, and of the means over these seeds."""
    rows, package = [], sides[PACKAGE]
    for name, plain in sides.items():
        common = [seed for seed in package.seeds if seed in plain.seeds]
        groups = [(f"seed {seed}", [seed]) for seed in common]
        if len(common) > 1:
            groups.append((f"mean over {len(common)} seeds", common))
        for title, seeds in groups if name != PACKAGE else []:
            vectors = [[side.vectors[side.seeds.index(seed)] for seed in seeds] for side in (package, plain)]
            statistics = {
                key: difference(*(mean_metric(metric, studies, side) for side in vectors))
                for key, metric in METRICS.items()
            }
            rows.append([name, title, *(cell(value, "+") for value in estimate(studies, statistics).values())])
    return table(["against", "", *METRICS], rows)


def _subgroups(studies: pd.DataFrame, hardware: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield title and mask of the study types with MIN_POSITIVES, and of the studies without hardware."""
    for name in sorted(studies["study_type"].unique()):
        mask = (studies["study_type"] == name).to_numpy()
        positives = studies["label"].to_numpy()[mask].sum()
        if MIN_POSITIVES <= positives <= mask.sum() - MIN_POSITIVES:
            yield name, mask
    if hardware is not None:
        yield "without hardware", read_hardware(hardware, studies) == 0


def _subgroup_table(
    studies: pd.DataFrame, sides: Mapping[str, Side], subgroups: Iterable[tuple[str, np.ndarray]]
) -> str:
    rows = []
    for title, mask in subgroups:
        group = studies[mask]
        statistics = {
            name: mean_metric(compute_auroc, group, [vector[mask] for vector in side.vectors])
            for name, side in sides.items()
        }
        values = estimate(group, statistics)
        rows.append([title, str(len(group)), str(group["label"].sum()), *(cell(value) for value in values.values())])
    return table(["", "studies", "positive", *sides], rows)


def _shortcut_table(cut_studies: pd.DataFrame, studies: pd.DataFrame, hardware: Path | None) -> str:
    """Return the AUROC of scores that see no pixel: the study type's share of positives in train, and the hardware flag."""
    rest = cut_studies[cut_studies["fold"] >= 0]
    scores = {"study type": studies["study_type"].map(rest.groupby("study_type")["label"].mean()).fillna(0).to_numpy()}
    if hardware is not None:
        flag = read_hardware(hardware, studies)
        scores[f"hardware ({flag.sum()} studies, {studies['label'].to_numpy()[flag == 1].sum()} positive)"] = flag
    values = estimate(studies, {name: mean_metric(compute_auroc, studies, [score]) for name, score in scores.items()})
    return table(["score", "AUROC"], [[name, cell(value)] for name, value in values.items()])


def read_hardware(path: Path, studies: pd.DataFrame) -> np.ndarray:
    """Return 1 for each study whose patient has hardware, else 0, from a CSV with the columns patient and hardware.

    Raises:
        UserError: The file lacks a column or a patient.
    """
    flags = pd.read_csv(path)
    if not {"patient", "hardware"} <= set(flags.columns):
        raise UserError(
            f"--hardware {path} has the columns {', '.join(flags.columns)}. Give a CSV with patient and hardware."
        )
    flag = studies["patient"].map(flags.groupby("patient")["hardware"].max())
    if flag.isna().any():
        raise UserError(
            f"--hardware {path} lacks {studies['patient'][flag.isna()].iloc[0]}. Add a line for each patient of valid."
        )
    return flag.to_numpy(np.int64)


# ---- commands


def run_cut(options: argparse.Namespace) -> None:
    studies = cut(options.source, options.out)
    make_shards(options.out, options.size)
    groups = {"valid": studies["fold"] < 0} | {f"fold {fold}": studies["fold"] == fold for fold in range(NUM_FOLDS)}
    header = ["study type", *groups]
    rows = []
    for name, group in [*studies.groupby("study_type"), ("all", studies)]:
        cells = [group["label"][mask[group.index]] for mask in groups.values()]
        rows.append([str(name), *(f"{labels.sum()} of {len(labels)}" for labels in cells)])
    print(f"Positive studies\n\n{table(header, rows)}")


def parse_numbers(option: str, text: str, limit: int) -> list[int]:
    numbers = [int(word) if word.isdecimal() else limit for word in text.split(",")]
    if max(numbers) >= limit:
        raise UserError(f"{option} {text} is not a list of numbers below {limit}. Write {option} 0,1.")
    return numbers


def parse_variants(texts: Sequence[str], overrides: Sequence[str], size: int) -> dict[str, tuple[int, list[str]]]:
    """Return size and settings by variant. `size=` is a property of the shards, so it is taken out of the settings."""
    variants = {}
    for text in (BASELINE, *texts):
        name, *own = text.split() or [""]
        if not name or name in variants or any("=" not in word for word in own) or "=" in name:
            raise UserError(f"--variant {text!r} is not a new NAME and key=value arguments. Write 'no-ema ema=0'.")
        sizes = [int(word[len("size=") :]) for word in own if word.startswith("size=")]
        variants[name] = (sizes or [size])[-1], [*overrides, *(word for word in own if not word.startswith("size="))]
    return variants


def run_folds(options: argparse.Namespace) -> None:
    studies, results = read_cut(options.out), Results(options.results or options.out / "results.jsonl")
    machine = Machine(options.ranks, options.threads)
    variants = parse_variants(options.variant, options.overrides, options.size)
    trainings = [
        Training({"kind": "fold", "variant": name, "fold": fold, "seed": options.seed}, settings, size, overrides)
        for fold in parse_numbers("--folds", options.folds, NUM_FOLDS)
        for name, (size, overrides) in variants.items()
        for settings in [describe(options.recipe, overrides, size)]
    ]
    for training in [] if options.report else results.pending(trainings):
        fold = training.key["fold"]
        shards = make_shards(options.out, training.size, fold)
        probability, cost = train_package(training, options.out, shards, options.recipe, machine)
        group = studies[studies["fold"] == fold]
        results.add(training, group, probability, cost, ranks=machine.ranks, threads=machine.threads)
        _remove_run(options.out, training)
        print(
            f"{training.name}: {results.lines('fold')[-1]['AUROC']:.3f}, {cost.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    print(report_folds(studies, results.lines("fold")))


def _remove_run(out: Path, training: Training) -> None:
    """Remove a measured training: its checkpoints take hundreds of megabytes."""
    run = out / "runs" / training.name
    run.with_name(f"{run.name}.cost.json").unlink()
    for folder in (run, run.with_name(f"{run.name}-valid")):
        shutil.rmtree(folder)


def run_final(options: argparse.Namespace) -> None:
    studies, results = read_cut(options.out), Results(options.results or options.out / "results.jsonl")
    valid = studies[studies["fold"] < 0]
    machine = Machine(options.ranks, options.threads)
    settings = describe(options.recipe, options.overrides, options.size)
    plain = {"size": options.size, "epochs": settings["epochs"], "batch": settings["global_batch"]}
    plain |= {"learning_rate": options.plain_learning_rate, "rotate_deg": options.plain_rotate_deg}
    plain |= {"architecture": settings["architecture"], "workers": options.plain_workers}
    contenders = {PACKAGE: settings} if options.package else {}
    contenders |= {f"plain {name}": plain | {"precision": name} for name in options.plain.split(",") if name}
    trainings = [
        Training({"kind": "final", "contender": name, "seed": seed}, values, options.size, options.overrides)
        for seed in parse_numbers("--seeds", options.seeds, 2**63)
        for name, values in contenders.items()
    ]
    for training in [] if options.report else results.pending(trainings):
        shards = make_shards(options.out, options.size)
        if training.key["contender"] == PACKAGE:
            probability, cost = train_package(training, options.out, shards, options.recipe, machine)
        else:
            probability, cost = train_plain(training, options.out, shards, machine.ranks * machine.threads)
        results.add(training, valid, probability, cost, ranks=machine.ranks, threads=machine.threads)
        print(f"{training.name}: {cost.seconds:.0f} s", file=sys.stderr, flush=True)
    print(report_final(studies, results.lines("final"), options.hardware))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    first = commands.add_parser("cut", help="cut valid and the folds, and convert")
    first.add_argument("source", type=Path, metavar="FOLDER", help="radiographs in MURA's layout")
    first.set_defaults(function=run_cut)
    folds = commands.add_parser("folds", help="compare variants of the recipe by cross-validation on train")
    folds.add_argument("--variant", action="append", default=[], metavar="'NAME key=value ...'", help="may be repeated")
    folds.add_argument("--folds", default="0,1,2,3,4", help="several commands may share the folds; default: 0,1,2,3,4")
    folds.add_argument("--seed", type=int, default=0, help="default: 0")
    folds.set_defaults(function=run_folds)
    final = commands.add_parser("final", help="compare the recipe with plain_loop.py on valid")
    final.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    final.add_argument(
        "--plain", default="fp32", help="precisions of the plain loop: fp32, bf16, both or ''; default: fp32"
    )
    final.add_argument("--plain-only", dest="package", action="store_false", help="train the plain loop only")
    final.add_argument("--plain-learning-rate", type=float, default=3e-4, help="default: 3e-4")
    final.add_argument("--plain-rotate-deg", type=float, default=30.0, help="default: 30")
    final.add_argument("--plain-workers", type=int, default=2, help="processes of the DataLoader; default: 2")
    final.add_argument("--hardware", type=Path, metavar="FILE.csv", help="columns patient, hardware (0 or 1)")
    final.set_defaults(function=run_final)
    for command in (first, folds, final):
        command.add_argument("out", type=Path, metavar="OUT")
        command.add_argument("--size", type=int, default=128, help="pixels of a side; default: 128")
    for command in (folds, final):
        recipe = ROOT / "launch/recipes/fracatlas.toml"
        command.add_argument("--recipe", type=Path, default=recipe, help="default: launch/recipes/fracatlas.toml")
        command.add_argument("--results", type=Path, metavar="FILE", help="default: OUT/results.jsonl")
        command.add_argument("--ranks", type=int, default=1, help="default: 1")
        command.add_argument("--threads", type=int, default=2, help="of each rank; default: 2")
        command.add_argument("--report", action="store_true", help="print the tables and train nothing")
        command.add_argument(
            "--set", nargs="+", default=[], dest="overrides", metavar="key=value", help="settings of all variants"
        )
    return parser.parse_args()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # so that a running training is stopped too
    options = parse_options()
    options.function(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"fracatlas.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(3)
    except subprocess.CalledProcessError as error:  # its message is on stderr
        sys.exit(error.returncode if error.returncode > 0 else 1)
