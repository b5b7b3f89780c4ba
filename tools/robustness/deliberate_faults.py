"""Insert faults into a copy of the package, one at a time, and check that a test of `tests/run.sh --all` fails.

    python tools/robustness/deliberate_faults.py [NAME ...]      about a minute per fault; exit status 1 if one is not detected
    python tools/robustness/deliberate_faults.py --list          list the faults, and check that their texts are in the source

A fault is one replacement in one file. If its text is no longer in the file, update the fault.
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
    """A replacement of `old` by `new` in mura_dist/`file`, which one of `tests` must detect."""

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
        "        positions[chunk] = rows[positions[chunk]]\n",
        "        positions[chunk] = rows[np.maximum(positions[chunk], 1)]\n",
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
        "lower-beta-of-adam",
        "training/engine.py",
        "betas=(0.9, 0.999)",
        "betas=(0.8, 0.999)",
        "tests/training/test_plain_loop.py",
    ),
    Fault(
        "higher-momentum-of-batchnorm",
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
        "no-normalization",
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
        "file-renamed-before-it-is-synced",
        "core/files.py",
        "        _finish(file)\n        os.replace(partial, path)",
        "        os.replace(partial, path)",
        "tests/training/test_checkpoint.py tests/data/shards tests/inference/test_predict.py",
    ),
    Fault(
        "resumed-at-the-start-of-the-epoch",
        "training/loop.py",
        "steps = self.epoch_steps(epoch, step_in_epoch)",
        "steps = self.epoch_steps(epoch, 0)",
        "tests/training/test_resume.py",
    ),
    Fault(
        "first-view-instead-of-mean",
        "metrics/classification.py",
        "weights=probability[order]) / np.bincount(code)",
        "weights=probability[order]) * 0 + probability[np.unique(code, return_index=True)[1]]",
        "tests/metrics tests/inference/test_grouping.py",
    ),
    Fault(
        "bootstrap-of-studies-instead-of-patients",
        "metrics/intervals.py",
        'unknown = patient == ""',
        'unknown = patient != "\\0"',
        "tests/metrics",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"faults to insert: {', '.join(fault.name for fault in FAULTS)}"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the faults and check that their texts are in the source"
    )
    options = parser.parse_args()
    names = options.names
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        parser.error(f"no fault {', '.join(sorted(unknown))}")
    if options.list:
        for fault in FAULTS:
            print(f"{fault.name}: mura_dist/{fault.file}{'' if is_current(fault) else ' does not contain its text'}")
        return 0 if all(map(is_current, FAULTS)) else 1
    detected = [is_detected(fault) for fault in FAULTS if not names or fault.name in names]
    print(f"{sum(detected)} of {len(detected)} faults are detected by a test")
    return 0 if all(detected) else 1


def is_current(fault: Fault) -> bool:
    """Return whether the source contains the text to replace exactly once."""
    path = ROOT / "mura_dist" / fault.file
    return path.is_file() and path.read_text().count(fault.old) == 1


def is_detected(fault: Fault) -> bool:
    """Run the fault's tests on a copy of the checkout with the fault. Return whether one of them fails."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        copy = Path(folder) / "main"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "data/phantoms", "*.tar", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        path = copy / "mura_dist" / fault.file
        text = path.read_text()
        if fault.old not in text:
            sys.exit(f"{fault.name}: mura_dist/{fault.file} does not contain {fault.old!r}. Update the fault.")
        path.write_text(text.replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not nightly"]
        result = subprocess.run(
            [*command, *fault.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
        failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
        detected = result.returncode == 1 and bool(failed)
        outcome = failed[0].split(" - ")[0] if detected else f"NOT DETECTED, pytest exited with {result.returncode}"
        print(f"{fault.name}: {outcome}", flush=True)
        return detected


if __name__ == "__main__":
    sys.exit(main())
