"""The sections of a report that say where its numbers come from: training, data, settings, versions. A Report in, markup out."""

from collections.abc import Iterator

from mura_dist.reports.cells import NOT_GIVEN, Found, Report, folds
from mura_dist.reports.html import Html, facts, folded, plain, table


def training(report: Report) -> Iterator[Html]:
    """Yield the training's curves and where its time went."""
    training_findings = report.findings["training"]
    if training_findings["ledger"] is None:
        yield NOT_GIVEN
    parts = []
    if curves := [*report.shown([name for name in report.pictures if name.startswith("curve-")])]:
        parts.append(folded("Curves: loss, learning rate, AUROC, speed", *curves))
    if lines := dict(_ledger(training_findings["ledger"] or {}, report.findings["evaluation"] or {})):
        parts.append(folded("Where the time went", facts(lines)))
    if parts:
        yield folds(parts)


def _ledger(ledger: Found, evaluation: Found) -> Iterator[tuple[str, str]]:
    for key, name, form in (
        ("num_steps", "steps", "{:,}"),
        ("images_per_s_median", "radiographs a second in training, median", "{:.1f}"),
        ("data_wait_share_median", "share of the steps' time spent waiting for data, median", "{:.3f}"),
        ("overhead_share_median", "share of the time that was neither step nor evaluation, median", "{:.3f}"),
        ("evaluation_s_median", "seconds of an evaluation on the way, median", "{:.1f}"),
        ("evaluation_s_total", "seconds of all of them", "{:,.1f}"),
        ("limited_by", "what limited it, at the end", "{}"),
        ("skipped_steps", "steps left out", "{:,}"),
        ("damaged_samples", "damaged samples met", "{:,}"),
    ):
        if ledger.get(key) is not None:
            yield name, form.format(ledger[key])
    for key, name, form in (
        ("seconds", "seconds of this evaluation, start included", "{:,.1f}"),
        ("num_radiographs", "radiographs scored in it", "{:,}"),
        ("radiographs_per_s", "radiographs a second in it", "{:.1f}"),
    ):
        if evaluation.get(key) is not None:
            yield name, form.format(evaluation[key])


def origins(report: Report) -> Iterator[Html]:
    """Yield what each split did, the data, the settings, the ensemble's members and the versions."""
    findings, parts = report.findings, []
    for title, key in (
        ("What each split did", "roles"),
        ("The data, and what its check found", "data"),
        ("Settings", "settings"),
    ):
        values = {name: plain(value) for name, value in findings[key].items()}
        parts.append(folded(title, facts(values) if values else NOT_GIVEN))
    if members := findings["members"]:
        keys = [key for key in ("run", "checkpoint", "architecture", "select_loss", "sha256") if key in members[0]]
        rows = [[plain(member.get(key)) for key in keys] for member in members]
        parts.append(folded("Members of the ensemble", table([key.replace("_", " ") for key in keys], rows)))
    parts.append(
        folded("Versions and machine", facts({key: plain(value) for key, value in findings["environment"].items()}))
    )
    yield folds(parts)
