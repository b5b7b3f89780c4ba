"""Apply a policy to radiographs that occur twice, byte for byte.

    Scan with its duplicates -> apply_policy -> Scan without some train radiographs, or with patients that stay together

| policy     | a copy in train, another in valid or test | copies of two train patients, when tune is cut      |
| ---------- | ----------------------------------------- | --------------------------------------------------- |
| keep       | both stay, reported                       | cut by patient, separated copies are reported       |
| drop-train | train's copies are dropped                | as keep                                             |
| group      | both stay, reported                       | these patients go to tune together or not at all    |

Valid and test never change, so that results stay comparable.
"""

from collections import defaultdict
from dataclasses import replace

from mura_dist.core.errors import UserError
from mura_dist.data.manifest import Manifest
from mura_dist.data.source import duplicates
from mura_dist.data.source.scan import DuplicateResolution, Scan, with_pairs

KEEP, DROP_TRAIN, GROUP = POLICIES = ("keep", "drop-train", "group")


def check_policy(policy: str) -> None:
    """Raise UserError for an unknown policy."""
    if policy not in POLICIES:
        raise UserError(f"--duplicates {policy!r}: must be one of {', '.join(POLICIES)}. The default is keep.")


def apply_policy(scan: Scan, policy: str) -> Scan:
    """Apply a policy to a scan. Unless the policy is keep, the scan must contain its duplicates.

    Raises:
        UserError: No radiograph of train would remain.
    """
    if policy == KEEP:
        return scan
    assert scan.duplicates is not None
    if policy == GROUP:
        return replace(scan, resolution=DuplicateResolution(policy, groups=_patient_groups(scan)))
    return _drop_train(scan)


def _drop_train(scan: Scan) -> Scan:
    remaining_pairs: list[tuple[str, str]] = []
    dropped: list[tuple[str, str]] = []
    for equal in duplicates.connected_groups(scan.duplicates or []):
        elsewhere = [path for path in equal if not _in_train(path)]
        dropped += [(path, elsewhere[0]) for path in equal if elsewhere and _in_train(path)]
        remaining_pairs += duplicates.pair_copies(elsewhere or equal)
    dropped_paths = {path for path, _ in dropped}
    frame = scan.manifest.frame
    remaining = frame[~frame["path"].isin(dropped_paths)]
    if dropped and not (remaining["split"] == "train").any():
        raise UserError(
            f"--duplicates {DROP_TRAIN}: all {len(dropped_paths):,} radiographs of train are copies of radiographs in another "
            f"split (first: {dropped[0][0]} = {dropped[0][1]}). Give another train, or --duplicates {KEEP}."
        )
    manifest = Manifest(remaining.reset_index(drop=True).rename_axis("row"))
    sizes = {path: size for path, size in scan.sizes.items() if path not in dropped_paths}
    resolution = DuplicateResolution(DROP_TRAIN, dropped=tuple(sorted(dropped)))
    return with_pairs(replace(scan, manifest=manifest, sizes=sizes, resolution=resolution), sorted(remaining_pairs))


def _patient_groups(scan: Scan) -> tuple[tuple[str, ...], ...]:
    """Return the groups of train patients that duplicates connect, directly or through others."""
    frame = scan.manifest.frame
    patient = dict(zip(frame["path"], frame["patient"], strict=True))
    patients_of: dict[str, set[str]] = defaultdict(set)
    for equal in duplicates.connected_groups(scan.duplicates or []):
        patients_of[equal[0]] = {patient[path] for path in equal if _in_train(path)}
    pairs = [(min(patients), member) for patients in patients_of.values() for member in patients]
    return tuple(map(tuple, duplicates.connected_groups(pairs)))


def _in_train(path: str) -> bool:
    return path.startswith("train/")
