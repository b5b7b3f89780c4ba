"""Test that README.txt and docs/prediction.md describe every column of every table."""

import re

import pytest
from helpers.commands import ROOT
from helpers.models import card_of

from mura_dist.inference import table_guide, tables
from mura_dist.metrics.operating_points import STUDY_COLUMNS


def test_contract_columns_come_first_in_order() -> None:
    contract = {
        "predictions": ["path", "study", "study_type", "logit", "probability", "gate"],
        "studies": list(STUDY_COLUMNS),
        "failures": ["path", "code", "reason"],
    }
    assert list(contract["studies"]) == (
        ["study", "study_type", "num_views", "probability", "calibrated_probability", "threshold", "call", "band"]
    )
    for table, columns in contract.items():
        assert list(table_guide.TABLES[table])[: len(columns)] == columns
    assert list(table_guide.STUDIES)[len(STUDY_COLUMNS) :] == ["gate", "trained_on"]


@pytest.mark.parametrize("format", tables.FORMATS)
@pytest.mark.parametrize("kind", ["phantoms", "radiographs"])
def test_readme_describes_every_column(kind: str, format: str) -> None:
    text = table_guide.readme(card_of(kind=kind), format)
    for table, columns in table_guide.TABLES.items():
        section = text.partition(f"{table}.{format}: ")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()[1:]] == list(columns)
        for column, meaning in columns.items():
            assert re.search(rf"^  {column} +{re.escape(meaning)}$", section, re.MULTILINE)
    assert ("TRAINED ON DRAWINGS" in text) == (kind == "phantoms")
    assert ("leading ./" in text) == (format == "csv")  # a cell of Parquet is no formula
    assert max(map(len, text.splitlines())) <= 130


def test_documentation_equals_the_readme() -> None:
    text = (ROOT / "docs/prediction.md").read_text()
    for table, columns in table_guide.TABLES.items():
        section = text.partition(f"| `{table}` |")[2].partition("\n\n")[0]
        documented = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
        assert documented == list(columns.items()), table
