"""Put a fault into a copy of the package, one at a time, and see that a test of `tests/run.sh --all` fails of it.

    python tools/robustness/deliberate_faults.py [NAME ...]      about a minute a fault; exit status 1 where a fault goes unseen

A fault is one replacement in one file. Where the text is not in the file any more, the fault has to be written anew.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """`tests`: where it must be seen; the fewer, the faster."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "wrong-flip", "data/loaders/opencv.py", "source[:, ::-1] if flip", "source[::-1] if flip", "tests/data/loaders"
    ),
    Fault(
        "lost-row",
        "data/loaders/sampler.py",
        "        places[part] = rows[places[part]]\n",
        "        places[part] = rows[np.maximum(places[part], 1)]\n",
        "tests/data/loaders/test_sampler.py",
    ),
    Fault(
        "torn-checkpoint",
        "training/checkpoint.py",
        "if not (folder / name).is_file() or sha256(folder / name) != digest:",
        "if not (folder / name).is_file():",
        "tests/training/test_checkpoint.py",
    ),
    Fault(
        "call-at-the-threshold",
        "metrics/classification.py",
        "np.asarray(probability) > np.asarray(threshold)",
        "np.asarray(probability) >= np.asarray(threshold)",
        "tests/metrics/test_classification.py",
    ),
    Fault(
        "swapped-class-weights",
        "data/class_weights.py",
        "(abnormal, 1 - abnormal) if",
        "(1 - abnormal, abnormal) if",
        "tests/data/test_class_weights.py",
    ),
    Fault(
        "shorter-memory-of-adam",
        "training/engine.py",
        "betas=(0.9, 0.999)",
        "betas=(0.8, 0.999)",
        "tests/training/test_plain_loop.py",
    ),
    Fault(
        "shorter-memory-of-batchnorm",
        "training/batchnorm.py",
        "MOMENTUM = 0.1",
        "MOMENTUM = 0.2",
        "tests/training/test_plain_loop.py",
    ),
    Fault(
        "patience-off-by-one",
        "training/schedule.py",
        "self.bad_epochs < settings.plateau_patience",
        "self.bad_epochs <= settings.plateau_patience",
        "tests/training/test_schedule.py",
    ),
    Fault(
        "inverted-dicom",
        "data/dicom.py",
        'inverted = photometric == "MONOCHROME1"',
        'inverted = photometric == "MONOCHROME2"',
        "tests/data/test_radiograph.py",
    ),
    Fault(
        "normalization-left-out",
        "models/densenet.py",
        "IMAGENET_MEAN = (0.485, 0.456, 0.406)",
        "IMAGENET_MEAN = (0.0, 0.0, 0.0)",
        "tests/models/test_densenet.py",
    ),
    Fault(
        "kappa-without-chance",
        "metrics/classification.py",
        "return (observed - chance) / (1 - chance)",
        "return (observed - chance / 2) / (1 - chance / 2)",
        "tests/metrics/test_classification.py",
    ),
    Fault(
        "file-replaced-before-it-is-whole",
        "core/files.py",
        "        _finish(file)\n        os.replace(partial, path)",
        "        os.replace(partial, path)",
        "tests/training/test_checkpoint.py tests/data/shards tests/inference/test_predict.py",
    ),
    Fault(
        "resumed-at-the-epochs-beginning",
        "training/loop.py",
        "steps = self.epoch_steps(epoch, step_in_epoch)",
        "steps = self.epoch_steps(epoch, 0)",
        "tests/training/test_resume.py",
    ),
    Fault(
        "one-view-in-place-of-all",
        "metrics/classification.py",
        "weights=probability[order]) / np.bincount(code)",
        "weights=probability[order]) * 0 + probability[np.unique(code, return_index=True)[1]]",
        "tests/metrics tests/inference/test_grouping.py",
    ),
    Fault(
        "studies-drawn-in-place-of-patients",
        "metrics/intervals.py",
        'unknown = patient == ""',
        'unknown = patient != "\\0"',
        "tests/metrics",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which of {', '.join(fault.name for fault in FAULTS)}"
    )
    names = parser.parse_args().names
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        parser.error(f"no fault {', '.join(sorted(unknown))}")
    seen = [is_seen(fault) for fault in FAULTS if not names or fault.name in names]
    print(f"{sum(seen)} of {len(seen)} faults are seen by a test")
    return 0 if all(seen) else 1


def is_seen(fault: Fault) -> bool:
    """Run the fault's tests on a copy of the checkout that has it; True where one of them fails."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        copy = Path(folder) / "main"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "data/phantoms", "*.tar", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        path = copy / "mura_dist" / fault.file
        text = path.read_text()
        if fault.old not in text:
            sys.exit(f"{fault.name}: mura_dist/{fault.file} does not hold {fault.old!r} any more; write the fault anew")
        path.write_text(text.replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not nightly"]
        done = subprocess.run(
            [*command, *fault.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        seen = done.returncode == 1 and bool(failed)
        what = failed[0].split(" - ")[0] if seen else f"NOT SEEN, pytest exited with {done.returncode}"
        print(f"{fault.name}: {what}", flush=True)
        return seen


if __name__ == "__main__":
    sys.exit(main())
