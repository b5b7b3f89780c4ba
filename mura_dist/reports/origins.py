"""Build the sections of a report on the origin of its numbers: training, data, settings, versions. A Report in, markup out."""

from collections.abc import Iterator

from mura_dist.reports.cells import NOT_GIVEN, Report, details_grid
from mura_dist.reports.findings import JsonObject
from mura_dist.reports.html import Html, details, facts_table, format_value, table


def training(report: Report) -> Iterator[Html]:
    """Yield the training curves and a breakdown of the training time."""
    training_findings = report.findings["training"]
    if training_findings["ledger"] is None:
        yield NOT_GIVEN
    parts = []
    if curves := [*report.picture_grid([name for name in report.pictures if name.startswith("curve-")])]:
        parts.append(details("Curves: loss, learning rate, AUROC, speed", *curves))
    if lines := dict(_ledger(training_findings["ledger"] or {}, report.findings["evaluation"] or {})):
        parts.append(details("Training time", facts_table(lines)))
    if parts:
        yield details_grid(parts)


def _ledger(ledger: JsonObject, evaluation: JsonObject) -> Iterator[tuple[str, str]]:
    for key, name, form in (
        ("num_steps", "steps", "{:,}"),
        ("images_per_s_median", "training radiographs per second, median", "{:.1f}"),
        ("data_wait_share_median", "share of the step time spent waiting for data, median", "{:.3f}"),
        ("overhead_share_median", "share of the time outside steps and evaluations, median", "{:.3f}"),
        ("evaluation_s_median", "seconds per evaluation during training, median", "{:.1f}"),
        ("evaluation_s_total", "seconds of all evaluations during training", "{:,.1f}"),
        ("limited_by", "bottleneck at the end", "{}"),
        ("skipped_steps", "steps skipped", "{:,}"),
        ("damaged_samples", "corrupt samples", "{:,}"),
    ):
        if ledger.get(key) is not None:
            yield name, form.format(ledger[key])
    for key, name, form in (
        ("seconds", "seconds of this evaluation, including startup", "{:,.1f}"),
        ("num_radiographs", "radiographs scored in this evaluation", "{:,}"),
        ("radiographs_per_s", "radiographs per second in this evaluation", "{:.1f}"),
    ):
        if evaluation.get(key) is not None:
            yield name, form.format(evaluation[key])


def origins(report: Report) -> Iterator[Html]:
    """Yield the roles of the splits, the data, the settings, the ensemble's members and the versions."""
    findings, parts = report.findings, []
    for title, key in (
        ("Roles of the splits", "roles"),
        ("Data and its check", "data"),
        ("Settings", "settings"),
    ):
        values = {name: format_value(value) for name, value in findings[key].items()}
        parts.append(details(title, facts_table(values) if values else NOT_GIVEN))
    if members := findings["members"]:
        keys = [key for key in ("run", "checkpoint", "architecture", "select_loss", "sha256") if key in members[0]]
        rows = [[format_value(member.get(key)) for key in keys] for member in members]
        parts.append(details("Members of the ensemble", table([key.replace("_", " ") for key in keys], rows)))
    parts.append(
        details(
            "Versions and machine",
            facts_table({key: format_value(value) for key, value in findings["environment"].items()}),
        )
    )
    yield details_grid(parts)
