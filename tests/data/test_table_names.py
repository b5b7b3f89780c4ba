"""Test table_names.py: no name becomes a formula, each can be restored, and comparison ignores the Unicode composition."""

import unicodedata

import numpy as np
import pandas as pd
import pytest

from mura_dist.data import table_names

HOSTILE = ["=1+1.png", "+a", "-a/b.png", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "=", "-"]
PLAIN = ["a=b.png", "valid/XR_HAND/-/image1.png", ".", "..", ".hidden", "a/./=b", "1", "", "ü=", "#a", " =a"]


@pytest.mark.parametrize("name", HOSTILE)
def test_formula_gets_a_leading_dot_and_is_restored(name: str) -> None:
    assert table_names.escape_formula(name) == f"./{name}"
    assert table_names.unescape(table_names.escape_formula(name)) == name
    assert table_names.escape_formula(table_names.escape_formula(name)) == table_names.escape_formula(name)


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_are_unchanged(name: str) -> None:
    assert table_names.escape_formula(name) == table_names.unescape(name) == name


@pytest.mark.parametrize("dtype", ["string", object])
def test_numbers_of_a_table_are_unchanged(dtype: object) -> None:
    names = [*HOSTILE, *PLAIN, None]
    frame = pd.DataFrame({"path": pd.Series(names, dtype=dtype), "logit": -np.arange(len(names), dtype=np.float32)})
    actual = table_names.escape_formulas(frame)
    assert list(actual.columns) == ["path", "logit"]
    assert actual["path"].dropna().tolist() == [*map(table_names.escape_formula, names[:-1])]
    assert actual["path"].isna().tolist() == [False] * (len(names) - 1) + [True]
    pd.testing.assert_series_equal(actual["logit"], frame["logit"])
    assert frame["path"].iloc[0] == "=1+1.png"  # the input is unchanged
    assert table_names.escape_formulas(frame.iloc[:0]).to_csv(index=False) == "path,logit\n"


def test_composed_and_decomposed_names_have_one_key() -> None:
    for name in ("Müller", "=Größe/å.png", "각", "ệ"):
        spelt = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
        assert len(spelt) == 2
        assert {table_names.join_key(prefix + item) for item in spelt for prefix in ("", "./")} == {name}
