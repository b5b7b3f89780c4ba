"""What a conversion does about radiographs that are there twice, byte for byte.

    Scan with its duplicates -> apply_policy -> Scan: some radiographs of train are dropped, or some patients go to tune together

| policy     | a copy in train, another in valid or test | copies of two patients of train, when tune is cut |
| ---------- | ----------------------------------------- | ------------------------------------------------- |
| keep       | both stay, reported                       | cut by patient; what is cut apart is reported     |
| drop-train | train's copies are dropped                | as keep                                           |
| group      | both stay, reported                       | these patients go to tune together or not at all  |

Valid and test are never changed: results on them are compared with those of others.
"""

from collections import defaultdict
from dataclasses import replace

from mura_dist.core.errors import UserError
from mura_dist.data.manifest import Manifest
from mura_dist.data.source import duplicates
from mura_dist.data.source.scan import DuplicateResolution, Scan, with_pairs

KEEP, DROP_TRAIN, GROUP = POLICIES = ("keep", "drop-train", "group")


def check_policy(policy: str) -> None:
    """Raise UserError where there is no such policy."""
    if policy not in POLICIES:
        raise UserError(f"--duplicates {policy!r}: must be one of {', '.join(POLICIES)}; keep is the default")


def apply_policy(scan: Scan, policy: str) -> Scan:
    """Return the scan as `policy` has it. Unless that is keep, its duplicates must have been looked for.

    Raises:
        UserError: where no radiograph of train would stay.
    """
    if policy == KEEP:
        return scan
    assert scan.duplicates is not None
    if policy == GROUP:
        return replace(scan, resolution=DuplicateResolution(policy, groups=_patients(scan)))
    return _drop_train(scan)


def _drop_train(scan: Scan) -> Scan:
    kept: list[tuple[str, str]] = []
    dropped: list[tuple[str, str]] = []
    for equal in duplicates.connected_groups(scan.duplicates or []):
        elsewhere = [path for path in equal if not _in_train(path)]
        dropped += [(path, elsewhere[0]) for path in equal if elsewhere and _in_train(path)]
        kept += duplicates.pair_copies(elsewhere or equal)
    gone = {path for path, _ in dropped}
    frame = scan.manifest.frame
    rest = frame[~frame["path"].isin(gone)]
    if gone and not (rest["split"] == "train").any():
        raise UserError(
            f"--duplicates {DROP_TRAIN}: all {len(gone):,} radiographs of train are copies of radiographs in another split, the "
            f"first is {dropped[0][0]} = {dropped[0][1]}; give another train, or --duplicates {KEEP}"
        )
    manifest = Manifest(rest.reset_index(drop=True).rename_axis("row"))
    sizes = {path: size for path, size in scan.sizes.items() if path not in gone}
    resolution = DuplicateResolution(DROP_TRAIN, dropped=tuple(sorted(dropped)))
    return with_pairs(replace(scan, manifest=manifest, sizes=sizes, resolution=resolution), sorted(kept))


def _patients(scan: Scan) -> tuple[tuple[str, ...], ...]:
    """The patients of train that duplicates connect, directly or through others."""
    frame = scan.manifest.frame
    patient = dict(zip(frame["path"], frame["patient"], strict=True))
    of_file: dict[str, set[str]] = defaultdict(set)
    for equal in duplicates.connected_groups(scan.duplicates or []):
        of_file[equal[0]] = {patient[path] for path in equal if _in_train(path)}
    pairs = [(min(patients), other) for patients in of_file.values() for other in patients]
    return tuple(map(tuple, duplicates.connected_groups(pairs)))


def _in_train(path: str) -> bool:
    return path.startswith("train/")
