"""Test score: published kappas from files, tables in many formats, and one error message for each invalid file."""

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import laws
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist.cli.main import DONE, main
from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.evaluation import prediction_files, score

Line = tuple[str, object]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "RESAMPLES", 50)


def write(path: Path, lines: Sequence[Sequence[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return path


def tables_of_confusions(confusions: dict[str, Sequence[int]], split: str = "test") -> tuple[list[Line], list[Line]]:
    """Return predictions and labels in the official format, two studies per patient, with these confusion matrices."""
    predictions: list[Line] = []
    labels: list[Line] = []
    for name, cells in confusions.items():
        for cell, num in zip(((0, 0), (0, 1), (1, 0), (1, 1)), cells, strict=True):
            for _ in range(num):
                number = len(labels)
                study = f"MURA-v1.1/{split}/XR_{name.upper()}/patient{11184 + number // 2}/study{number}/"
                labels.append((study, cell[0]))
                predictions.append((study, cell[1]))
    order = np.random.default_rng(0).permutation(len(predictions))
    return [predictions[index] for index in order], labels


SMALL = {"wrist": (14, 3, 2, 12), "hand": (12, 2, 4, 13)}


def score_json(capsys, *arguments: object) -> dict:
    """Return the JSON that `score ... --json` prints as its only stdout."""
    capsys.readouterr()
    status = main(["score", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == DONE, err
    return json.loads(out)


# ---- published numbers


def test_command_reproduces_official_vectors(
    shared: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "RESAMPLES", 0)
    submissions = json.loads((shared / "vectors/official_kappa.json").read_text())["submissions"]
    for vector in submissions:
        confusions = {name: cells for name, cells in vector["confusion_tn_fp_fn_tp"].items() if name != "overall"}
        predictions, labels = tables_of_confusions(confusions)
        paths = write(tmp_path / "p.csv", predictions), write(tmp_path / "l.csv", [("Study", "Label"), *labels])
        metrics = score_json(capsys, *paths)
        groups = {"overall": metrics["overall"]}
        groups |= {name.removeprefix("XR_").lower(): group for name, group in metrics["by_study_type"].items()}
        for name, kappas in vector["official_kappa"].items():
            scores = [groups[name][key] for key in ("kappa", "kappa_official_low", "kappa_official_high")]
            assert scores == pytest.approx(kappas, abs=1e-9), (vector["id"], name)
        assert mura.is_official_test(joined(*paths))
    assert len(submissions) == 20


def joined(predictions: Path, labels: Path, **options: float) -> pd.DataFrame:
    table = prediction_files.read_predictions(predictions, **options)
    return prediction_files.join(table, prediction_files.read_labels(labels))


def test_official_test_is_recognized_by_its_counts() -> None:
    rows = [(name, label) for name, pair in mura.STUDIES_TEST.items() for label in (0, 1) for _ in range(pair[label])]
    studies = pd.DataFrame(rows, columns=["study_type", "label"])
    assert len(studies) == 207
    assert mura.is_official_test(studies)
    assert not mura.is_official_test(studies.iloc[1:])
    assert not mura.is_official_test(studies.assign(label=studies["label"].where(studies.index != 5, 1)))
    assert not mura.is_official_test(studies.assign(study_type="XR_WRIST"))
    assert not mura.is_official_test(studies.iloc[:0])


# ---- table formats


def join_lines(lines: Sequence[Sequence[object]], end: str = "\n") -> bytes:
    return "".join(",".join(map(str, line)) + end for line in lines).encode()


def change_paths(change: Callable[[str], str], lines: Sequence[Line]) -> list[Line]:
    return [(change(study), value) for study, value in lines]


SPELLINGS: dict[str, Callable[[list[Line]], bytes]] = {
    "as it is": join_lines,
    "CRLF": lambda lines: join_lines(lines, "\r\n"),
    "old Mac": lambda lines: join_lines(lines, "\r"),
    "a byte-order mark": lambda lines: b"\xef\xbb\xbf" + join_lines(lines),
    "trailing commas": lambda lines: join_lines(lines, ",\n"),
    "some trailing commas": lambda lines: join_lines(lines[:9], ",,\n") + join_lines(lines[9:]),
    "empty lines": lambda lines: b"\n" + join_lines(lines, "\n\n,\n"),
    "quotes": lambda lines: join_lines([(f'"{study}"', f' "{value}"') for study, value in lines]),
    "no trailing slash": lambda lines: join_lines(change_paths(lambda path: path.rstrip("/"), lines)),
    "from the split on": lambda lines: join_lines(change_paths(lambda path: path.removeprefix("MURA-v1.1/"), lines)),
    "nested": lambda lines: join_lines(change_paths(lambda path: f"MURA-v1.1/{path}", lines)),
    "absolute": lambda lines: join_lines(change_paths(lambda path: f"/data/x ray/{path}", lines)),
    "backslashes": lambda lines: join_lines(change_paths(lambda path: "D:\\" + path.replace("/", "\\"), lines)),
    "decimals": lambda lines: join_lines([(study, float(str(value))) for study, value in lines]),
    "semicolons": lambda lines: join_lines(lines).replace(b",", b";"),
    "tabs in UTF-16": lambda lines: join_lines(lines).decode().replace(",", "\t").encode("utf-16"),
    "decimal commas": lambda lines: join_lines([(study, f"{value},0") for study, value in lines]).replace(b"/,", b"/;"),
    "a leading ./": lambda lines: join_lines(change_paths(lambda path: f"./{path}", lines)),
    "the other way round": lambda lines: join_lines(lines[::-1]),
}
HEADERS = {
    "predictions": ["study,prediction", "Study,Call", "path, PREDICTION", "\ufeffstudy,call"],
    "labels": ["Study,Label", "STUDY,label", "Img_Path,Label", "study,label,", "\ufeffStudy,Label"],
}


def test_studies_identical_for_all_table_formats(tmp_path: Path) -> None:
    """Predictions and labels, each in every format, give the same studies."""
    predictions, labels = tables_of_confusions(SMALL)
    plain = {"predictions": join_lines(predictions), "labels": join_lines(labels)}
    lines = {"predictions": predictions, "labels": labels}

    def studies(**changed: bytes) -> pd.DataFrame:
        for role, data in (plain | changed).items():
            (tmp_path / f"{role}.csv").write_bytes(data)
        return joined(tmp_path / "predictions.csv", tmp_path / "labels.csv").sort_values("study", ignore_index=True)

    expected = studies()
    assert len(expected) == 62
    assert list(expected.columns) == ["study", "study_type", "patient", "label", "call"]
    assert expected["study"].str.match(r"test/XR_(WRIST|HAND)/patient\d{5}/study\d+$").all()
    for role, table in lines.items():
        for name, spell in SPELLINGS.items():
            pd.testing.assert_frame_equal(studies(**{role: spell(table)}), expected, obj=f"{role}, {name}")
        for header in HEADERS[role]:
            data = f"{header}\n".encode() + plain[role]
            pd.testing.assert_frame_equal(studies(**{role: data}), expected, obj=f"{role}, {header}")


@pytest.mark.parametrize("header", [[], [("Study", "Rad1", "Rad2", "Rad3")]])
def test_label_is_the_majority_of_three_votes(header: list, tmp_path: Path) -> None:
    votes = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    path = write(tmp_path / "l.csv", [*header, *((f"s{index}", *vote) for index, vote in enumerate(votes))])
    assert prediction_files.read_labels(path).frame["label"].tolist() == [int(sum(vote) >= 2) for vote in votes]


def test_names_outside_muras_layout_match_by_text(tmp_path: Path) -> None:
    """Names contain commas and umlauts. Study types and patients come from the label file."""
    rows = [("Müller, left", 0, "p1", "XR_HAND"), ("b/", 1, "p1", ""), ("c", 1, "", "XR_HAND"), ("d", 0, "p2", "")]
    labels = write(tmp_path / "l.csv", [("study", "label", "patient", "study_type"), *rows])
    lines = [("study", "study_type", "probability")]
    lines += [("d", "XR_HAND", 0.5), ("b", "XR_FOOT", 0.7), ("c/", "XR_FOOT", 0.2), ("Müller, left", "", 0.1)]
    studies = joined(write(tmp_path / "p.csv", lines), labels)
    assert studies["study"].tolist() == ["Müller, left", "b", "c", "d"]
    assert studies["study_type"].tolist() == ["XR_HAND", "XR_FOOT", "XR_HAND", "XR_HAND"]
    assert studies["patient"].tolist() == ["p1", "p1", None, "p2"]
    assert studies["label"].tolist() == [0, 1, 1, 0]
    assert studies["call"].tolist() == [0, 1, 0, 0]  # 0.5 is not above 0.5


def test_patients_are_matched_across_study_types(tmp_path: Path) -> None:
    names = ["valid/XR_HAND/patient00001/study1_negative", "valid/XR_WRIST/patient00001/study1_positive", "other"]
    lines = [(name, index % 2) for index, name in enumerate(names)]
    studies = joined(write(tmp_path / "p.csv", lines), write(tmp_path / "l.csv", lines))
    assert studies["patient"].tolist() == ["patient00001", "patient00001", None]
    assert studies["study_type"].tolist() == ["XR_HAND", "XR_WRIST", "unknown"]
    assert prediction_files.common_split(studies) is None
    assert prediction_files.common_split(studies.iloc[:2]) == "valid"


def test_windows_1252_is_the_fallback_encoding(tmp_path: Path, capsys) -> None:
    """A German Excel writes such CSVs. predict on macOS writes decomposed names."""
    labels, predictions = tmp_path / "l.csv", tmp_path / "p.csv"
    labels.write_bytes("study;label;patient\nMüller – 1;normal;=a\nMüller 2;Abnormal;b\n=3;1,0;b\n".encode("cp1252"))
    predictions.write_text("study,probability,trained_on\nMu\u0308ller – 1,0.1,phantoms\nMüller 2,0.9,\n./=3,0.8,\n")
    studies = joined(predictions, labels)
    assert studies["study"].tolist() == ["Müller – 1", "Müller 2", "=3"]
    assert studies["label"].tolist() == [0, 1, 1]
    metrics = score_json(capsys, predictions, labels, "--out", tmp_path / "out")
    notes = "p.csv: the model was trained on drawings (phantoms); p.csv: calls are probability > 0.5; "
    assert metrics["note"] == f"{notes}l.csv: not UTF-8: read as Windows-1252"
    scored = pd.read_csv(tmp_path / "out" / "studies.csv")
    assert scored["study"].tolist() == ["Müller – 1", "Müller 2", "./=3"]
    assert scored["patient"].tolist() == ["./=a", "b", "b"]
    rescored = score_json(capsys, tmp_path / "out" / "studies.csv", labels)
    assert rescored["overall"] == metrics["overall"]


def test_labels_as_words_without_header_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", [("s1", "abnormal"), ("s2", "Normal"), ("s3", "positive"), ("s4", "NEGATIVE")])
    frame = prediction_files.read_labels(path).frame
    assert (frame["study"].tolist(), frame["label"].tolist()) == (["s1", "s2", "s3", "s4"], [1, 0, 1, 0])


def test_unknown_patients_are_reported(tmp_path: Path, capsys) -> None:
    lines = [(f"s{index}", index % 2) for index in range(30)]
    metrics = score_json(capsys, write(tmp_path / "p.csv", lines), write(tmp_path / "l.csv", lines))
    assert "clustering unknown" in metrics["overall"]["interval_method"]
    assert metrics["overall"]["num_patients"] is None
    assert list(metrics["by_study_type"]) == ["unknown"]
    assert metrics["split"] is None


# ---- studies.csv


def predict_table(call: Sequence[object], threshold: object = 0.3) -> list[list[object]]:
    """Return studies.csv as predict writes it, with four studies whose labels are 0, 0, 1, 1."""
    header = ["study", "study_type", "num_views", "probability", "calibrated_probability", "threshold", "call", "band"]
    values, constants = (0.2, 0.4, 0.6, 0.25), ("ok", "radiographs")
    lines = ([f"s{i}", "XR_HAND", 2, values[i], "", threshold, call[i], "", *constants] for i in range(4))
    return [[*header, "gate", "trained_on"], *lines]


LABELLED = [("study", "label"), ("s0", 0), ("s1", 0), ("s2", 1), ("s3", 1)]


@pytest.mark.parametrize(
    ("call", "option", "calls", "threshold", "note"),
    [
        ([0, 1, 1, 0], None, [0, 1, 1, 0], 0.3, "the file's own calls"),
        (["0.0", "1.0", "1.0", "1.0"], None, [0, 1, 1, 1], 0.3, "the file's own calls"),
        (
            [0, 1, 1, ""],
            None,
            [0, 0, 1, 0],
            0.5,
            "1 of 4 studies have no call in the file: calls are probability > 0.5",
        ),
        ([0, 1, 1, 0], 0.22, [0, 1, 1, 1], 0.22, "calls are probability > 0.22"),
    ],
)
def test_calls_come_from_the_table_or_a_threshold(
    call: list, option: float | None, calls: list[int], threshold: float, note: str, tmp_path: Path, capsys
) -> None:
    predictions = write(tmp_path / "studies.csv", predict_table(call))
    labels = write(tmp_path / "l.csv", LABELLED)
    options = [] if option is None else ["--threshold", option]
    assert joined(predictions, labels, **({} if option is None else {"threshold": option}))["call"].tolist() == calls
    metrics = score_json(capsys, predictions, labels, *options)
    assert (metrics["threshold"], metrics["note"]) == (threshold, f"studies.csv: {note}")
    assert metrics["overall"]["auroc"] == roc_auc_score([0, 0, 1, 1], [0.2, 0.4, 0.6, 0.25])
    assert metrics["subgroups"]["num_views"]["2"]["num_studies"] == 4


@pytest.mark.parametrize("value", ["", "2.5", "-1", "nan", "1e30", "many"])
def test_invalid_optional_columns_are_ignored(value: str, tmp_path: Path, capsys) -> None:
    """Invalid values in other columns have no effect."""
    table = predict_table([0, 1, 1, 0], threshold=value if value != "2.5" else 7)
    table[2][2] = value
    predictions, labels = write(tmp_path / "studies.csv", table), write(tmp_path / "l.csv", LABELLED)
    assert "num_views" not in joined(predictions, labels)
    metrics = score_json(capsys, predictions, labels)
    assert metrics["threshold"] is None
    assert metrics["subgroups"] == {}


def test_parquet_equals_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table = predict_table([0, 1, 1, None])
    frame = pd.DataFrame(table[1:], columns=table[0]).astype({"call": "Int64", "study": "string"})
    frame["probability"] = [1 / 3, 2 / 7, 0.6, np.nextafter(0.5, 1)]
    frame["calibrated_probability"] = np.nan
    frame.to_parquet(tmp_path / "p.parquet", index=False)
    frame.to_csv(tmp_path / "p.csv", index=False)
    labels = write(tmp_path / "l.csv", LABELLED)
    first, second = (joined(tmp_path / name, labels) for name in ("p.parquet", "p.csv"))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert first["probability"].tolist() == frame["probability"].tolist()


def test_zeros_and_ones_are_calls_unless_named_probability(tmp_path: Path) -> None:
    lines = [("a", 0), ("b", 1), ("c", "1.0")]
    for header, probabilities in (([], False), (["prediction"], False), (["call"], False), (["probability"], True)):
        path = write(tmp_path / "p.csv", [*(("study", name) for name in header), *lines])
        table = prediction_files.read_predictions(path)
        assert ("probability" in table.frame, table.threshold) == (probabilities, 0.5 if probabilities else None)
        assert table.frame["call"].tolist() == [0, 1, 1]
    path = write(tmp_path / "p.csv", [*lines[:2], ("c", 0.999)])  # one other value makes all of them probabilities
    assert prediction_files.read_predictions(path).frame["probability"].tolist() == [0, 1, 0.999]


def test_label_column_of_predictions_is_ignored(tmp_path: Path) -> None:
    table = pd.DataFrame(predict_table([0, 1, 1, 0])[1:], columns=predict_table([0] * 4)[0]).assign(
        patient="q", label=1
    )
    table.to_csv(tmp_path / "studies.csv", index=False)
    studies = joined(tmp_path / "studies.csv", write(tmp_path / "l.csv", LABELLED))
    assert studies["label"].tolist() == [0, 0, 1, 1]
    assert studies["patient"].isna().all()


def test_studies_named_by_file_are_matched(tmp_path: Path) -> None:
    """predict names the studies of a flat folder by file. Labels may use these names."""
    table = predict_table([0, 1, 1, 0])
    table[1:] = [[f"{line[0]}.png", *line[1:]] for line in table[1:]]
    labels = write(tmp_path / "l.csv", [LABELLED[0], *((f"{study}.png", label) for study, label in LABELLED[1:])])
    assert len(joined_of_files(write(tmp_path / "studies.csv", table), labels)) == 4
    with pytest.raises(UserError, match="4 of 4 lines name an image"):
        joined_of_files(tmp_path / "studies.csv", write(tmp_path / "l.csv", LABELLED))


def joined_of_files(predictions: Path, labels: Path) -> pd.DataFrame:
    table = prediction_files.read_predictions(predictions)
    return prediction_files.join(table, prediction_files.read_labels(labels, files_are_studies=table.files_are_studies))


def test_official_format_round_trip(tmp_path: Path) -> None:
    names = [
        "valid/XR_WRIST/patient11185/study1_positive",
        "valid/XR_HAND/patient00001/study2_negative",
        'a "b", c',
        "=1",
    ]
    studies = pd.DataFrame({"study": names, "call": [1, 0, 1, 0]})
    text = prediction_files.format_official(studies)
    assert text.splitlines()[0] == "MURA-v1.1/valid/XR_WRIST/patient11185/study1_positive/,1"
    (tmp_path / "p.csv").write_text(text)
    frame = prediction_files.read_predictions(tmp_path / "p.csv").frame
    assert frame["study"].tolist() == names
    assert frame["call"].tolist() == [1, 0, 1, 0]
    assert text.splitlines()[-1] == "./=1/,0"


# ---- refusals

GOOD = "a,0\nb,1\nc,1\nd,0\n"
IMAGES = "".join(f"MURA-v1.1/valid/XR_HAND/patient00001/study1_positive/image{i}.png,1\n" for i in range(1, 5))
PREDICTIONS = {
    "missing": ("a,0\nb,1\n", "p.csv: 2 studies missing of the 4 of l.csv (c, d)", "Predict every study"),
    "unknown": (GOOD + "e,1\n", "p.csv: 1 study unknown to l.csv (e)", "Label or delete them"),
    "none in common": ("x/a,0\nx/b,1\n", "no study in common", "'x/a' in the one", "'a' in the other"),
    "twice": (GOOD + "b/,1\nc,0\nc,1\n", "2 studies more than once (b, c; the first on lines 2, 5)", "Keep one line"),
    "images": (IMAGES, "4 of 4 lines name an image", "image1.png", "and 1 more", "mean over its views"),
    "images with slashes": (IMAGES.replace(".png", ".png/"), "4 of 4 lines name an image"),
    "images under a header": (f"study,probability\n{IMAGES}", "4 of 4 lines name an image"),
    "our predictions.csv": (
        "path,study,study_type,logit,probability,gate\na/1.png,a,XR_HAND,0.1,0.52,\n",
        *("one line per radiograph", "Pass studies.csv"),
    ),
    "above 1": (
        GOOD.replace("b,1", "b,1.7"),
        *("p.csv line 2: prediction '1.7' is outside [0, 1] (1 study of 4 so: b)", "0 or 1, or a probability"),
    ),
    "below 0": (GOOD.replace("b,1", "b,-0.1"), "'-0.1' is outside [0, 1]"),
    "a logit": ("study,probability\na,-2.5\nb,3\n", "p.csv line 2", "2 studies of 2 so: a, b"),
    "infinite": (GOOD.replace("b,1", "b,inf"), "'inf' is outside [0, 1]"),
    "NaN": (GOOD.replace("b,1", "b,nan"), "'nan' is not a number"),
    "no number": (GOOD.replace("b,1", "b,abnormal"), "prediction 'abnormal' is not a number", "0 or 1"),
    "digits with underscores": (GOOD.replace("b,1", "b,0_1"), "'0_1' is not a number"),
    "two commas": (GOOD.replace("b,1", 'b,"0,7,1"'), "'0,7,1' is not a number"),
    "no value": (GOOD.replace("b,1", "b,"), "prediction is empty (1 study of 4 so: b)"),
    "a call that is none": ("study,call\na,0\nb,2\n", "call '2' is outside 0/1"),
    "no name": (GOOD + ",1\n", "p.csv line 5 names no study"),
    "empty": ("", "p.csv has no rows"),
    "blank": ("\n\n,\n", "p.csv has no rows"),
    "a header only": ("study,probability\n", "p.csv has no rows"),
    "no header, no data": ("stuby,probabilty\na,1\n", "line 1: 'stuby,probabilty' is neither", "did you mean study?"),
    "JSON": ('{"overall": 1}\n', "neither a study's line (study,number) nor a known header"),
    "a misspelt header": ("stdy,call\na,1\n", "no column study", "did you mean study?"),
    "no value column": ("study,study_type\na,1x\n", "no column probability, call or prediction"),
    "a slip": ("study,call,calibrated_probabilty\na,1,0\n", "did you mean calibrated_probability?"),
    "a column twice": ("study,call,call\na,1,0\n", "names call twice"),
    "labels": ("Study,Label\na,1\n", "p.csv holds labels, not predictions", "the order is PREDICTIONS LABELS"),
    "one column": ("a/b\nc/d\n", "wrong number of columns, 1 (2 without a header"),
    "three columns": ("a,1,0.5\nb,1,0.2\n", "wrong number of columns, 3"),
    "a longer line": (
        GOOD + "f, g,1\n",
        "p.csv line 5: wrong number of columns, 3 where the table has 2",
        "quote names",
    ),
    "a shorter line": ("study,call\na,1\nb\n", "p.csv line 3: wrong number of columns, 1 where the table has 2"),
    "an open quote": (GOOD + '"e,1\n', "is not CSV", "Fix the line"),
    "bytes": (b"\x89PNG\0\0", "p.csv is not a text file"),
    "half a UTF-16": (GOOD.encode("utf-16")[:-1], "p.csv is not UTF-16, though its byte-order mark says so"),
    "UTF-8 and Windows-1252": ("a,0\nmü".encode() + b"m\xfcller,1\n", "p.csv line 2 is not UTF-8 (byte 0xfc)"),
    "composed in two ways": (GOOD + "Mu\u0308,1\nM\xfc,0\n", "1 study more than once (M\xfc;", "composed form, NFC"),
}
LABELS = {
    "outside 0/1": (
        GOOD.replace("b,1", "b,2"),
        "l.csv line 2: label '2' is outside 0/1 (1 study of 4 so: b)",
        "0 (normal) or 1 (abnormal)",
    ),
    "words": (GOOD.replace("b,1", "b,doubtful"), "label 'doubtful' is not a number"),
    "blank": (GOOD.replace("b,1", "b,"), "label is empty"),
    "conflicting": (GOOD + "b,0\n", "l.csv: 1 study with both labels (b)", "Delete the wrong lines"),
    "repeated": (GOOD + "b,1\n", "l.csv: 1 study more than once (b; the first on lines 2, 5)"),
    "probabilities": ("a,0.1\nb,0.9\n", "'0.1' is outside 0/1", "the order is PREDICTIONS LABELS"),
    "a table of predictions": ("study,probability\na,0.5\n", "l.csv holds predictions, not labels", "the order is"),
    "images": (IMAGES, "l.csv: 4 of 4 lines name an image"),
    "a blank radiologist": ("Study,Rad1,Rad2,Rad3\na,1,0,\n", "radiologist's label is empty", "so: a"),
    "a split": (
        "Study,Rad1,Rad2\na,1,0\nb,1,1\n",
        "1 study on which 2 radiologists are evenly split (a)",
        "odd number",
    ),
    "label and radiologists": ("Study,Label,Rad1\na,1,0\n", "a column label and radiologists' columns"),
    "no header on four columns": ("a,1,p1,XR_HAND\n", "radiologist's label 'p1' is not a number"),
    "three columns": (
        "a,1,0\n",
        "wrong number of columns, 3 (2 or 4 without a header",
        "add a header",
    ),
    "a slip": ("study,label,patient_id\na,1,7\n", "column 'patient_id' (did you mean patient?)"),
    "no rows": ("Study,Label\n", "l.csv has no rows"),
    "the name of all": (
        "study,label,study_type\na,0,overall\nb,1,\nc,1,\nd,0,\n",
        "1 study of study type 'overall' (a)",
        "another name",
    ),
}


@pytest.mark.parametrize("case", PREDICTIONS)
def test_invalid_predictions_are_refused(case: str, tmp_path: Path, capsys) -> None:
    check_refused(tmp_path, capsys, PREDICTIONS[case][0], GOOD, PREDICTIONS[case][1:])


@pytest.mark.parametrize("case", LABELS)
def test_invalid_labels_are_refused(case: str, tmp_path: Path, capsys) -> None:
    check_refused(tmp_path, capsys, GOOD, LABELS[case][0], LABELS[case][1:])


def check_refused(folder: Path, capsys, predictions: str | bytes, labels: str | bytes, phrases: Sequence[str]) -> None:
    for name, text in (("p.csv", predictions), ("l.csv", labels)):
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    laws.refusal(capsys, ["score", folder / "p.csv", folder / "l.csv"], *phrases)
    assert sorted(path.name for path in folder.iterdir()) == ["l.csv", "p.csv"]


def test_error_messages_are_unique() -> None:
    messages = [value[1] for value in PREDICTIONS.values()]
    assert len(set(messages)) > 0.8 * len(messages)


def test_invalid_arguments_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    good, folder = tmp_path / "good.csv", tmp_path / "folder"
    folder.mkdir()
    (folder / "studies.csv").write_text(GOOD)
    laws.refusal(capsys, ["score", tmp_path / "none.csv", good], "none.csv: no such file", "PREDICTIONS LABELS")
    laws.refusal(capsys, ["score", good, tmp_path / "none.csv"], "none.csv: no such file", "file of labels")
    laws.refusal(
        capsys, ["score", folder, good], "is a folder. Pass the file of predictions in it, perhaps studies.csv"
    )
    laws.refusal(capsys, ["score", ".", good], "is a folder")
    (tmp_path / "words.csv").write_text("hello world\n")
    message = laws.refusal(capsys, ["score", tmp_path / "words.csv", good], "neither a study's line").split(
        "Columns may be "
    )[1]
    assert len(set(message.strip().split(", "))) == len(message.split(", "))
    laws.refusal(capsys, ["score", good], "LABELS", "mura-dist score --help")
    laws.refusal(capsys, ["score", good, good, "--agains", good], "--agains", "--against")
    for value in ("0", "1", "1.5", "-1", "nan"):
        laws.refusal(
            capsys, ["score", good, good, "--prevalence", value], "--prevalence", "between 0 and 1", "0.4 is 40 %"
        )
    for value in ("-0.1", "1.5", "nan"):
        laws.refusal(capsys, ["score", good, good, "--threshold", value], f"--threshold {value}", "the default is 0.5")


# ---- inversion


def inverted_tables(tmp_path: Path, confusion: Sequence[int], patients: int | None = None) -> tuple[Path, Path]:
    _, labels = tables_of_confusions({"wrist": confusion})
    calls = [call for call, num in zip((0, 1, 0, 1), confusion, strict=True) for _ in range(num)]
    rows = [(f"s{i}", label, f"p{i % (patients or len(labels))}") for i, (_, label) in enumerate(labels)]
    predictions = write(tmp_path / "p.csv", [(f"s{i}", call) for i, call in enumerate(calls)])
    return predictions, write(tmp_path / "l.csv", [("study", "label", "patient"), *rows])


@pytest.mark.parametrize(
    ("confusion", "patients", "is_refused"),
    [
        ((10, 40, 40, 10), None, True),
        ((0, 20, 20, 0), None, True),  # exactly -1, which has no asymptotic bound
        ((0, 1, 1, 0), None, False),  # too few studies
        ((4, 7, 6, 4), None, False),  # -0.23, the upper bound above 0
        ((440, 560, 560, 440), None, False),  # -0.12, the upper bound below 0
        ((10, 40, 40, 10), 1, True),  # no bootstrap of one patient: the asymptotic bound
        ((2, 5, 5, 2), 1, False),  # no asymptotic bound either
        ((0, 0, 9, 1), None, False),  # one class: no kappa
    ],
)
def test_inverted_calls_are_refused(
    confusion: Sequence[int], patients: int | None, is_refused: bool, tmp_path: Path, capsys
) -> None:
    paths = inverted_tables(tmp_path, confusion, patients)
    if is_refused:
        phrases = ("looks inverted", "kappa is -", "Make 1 mean abnormal", "--allow-inverted")
        laws.refusal(capsys, ["score", *paths, "--json"], *phrases)
    metrics = score_json(capsys, *paths, *(["--allow-inverted"] if is_refused else []))
    assert metrics["overall"]["confusion"] == dict(zip(("tn", "fp", "fn", "tp"), confusion, strict=True))


def test_inverted_second_file_is_refused(tmp_path: Path, capsys) -> None:
    inverted, labels = inverted_tables(tmp_path, (10, 40, 40, 10))
    inverted = inverted.rename(tmp_path / "b.csv")
    good = write(tmp_path / "p.csv", [(f"s{i}", int(i >= 50)) for i in range(100)])
    laws.refusal(capsys, ["score", good, labels, "--against", inverted], "b.csv looks inverted: kappa is -0.6")


# ---- output files


def tables_with_probabilities(
    tmp_path: Path, name: str = "p.csv", seed: int = 0, noise: float = 1.3
) -> tuple[Path, Path]:
    _, labels = tables_of_confusions({"wrist": (30, 0, 0, 30), "hand": (30, 0, 0, 30)}, split="valid")
    rng = np.random.default_rng(seed)
    logit = [2 * int(str(label)) - 1 + rng.normal(0, noise) for _, label in labels]
    lines = [(study, round(1 / (1 + np.exp(-x)), 3)) for (study, _), x in zip(labels, logit, strict=True)]
    return write(tmp_path / name, lines), write(tmp_path / "l.csv", labels)


def test_score_writes_a_folder(tmp_path: Path, capsys) -> None:
    predictions, labels = tables_with_probabilities(tmp_path)
    assert main(["score", str(predictions), str(labels)]) == DONE
    out, _ = capsys.readouterr()
    folder = tmp_path / "p-score"
    assert f"report: {folder}/report.html" in out
    assert "note: p.csv: calls are probability > 0.5" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["overall", "XR_HAND", "XR_WRIST"]
    assert "<html" in (folder / "report.html").read_text()
    metrics = json.loads((folder / "metrics.json").read_bytes())
    studies = pd.read_csv(folder / "studies.csv")
    assert metrics["overall"]["kappa"] == pytest.approx(cohen_kappa_score(studies["label"], studies["call"]))
    assert metrics["overall"]["auroc"] == pytest.approx(roc_auc_score(studies["label"], studies["probability"]))
    assert (metrics["split"], metrics["selected_on"], metrics["terms"]) == ("valid", None, mura.TERMS)
    for role, path in (("predictions", predictions), ("labels", labels)):
        assert metrics[role] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for path in folder.rglob("*"):
        assert path.is_dir() or str(tmp_path) not in path.read_text()
    assert main(["score", str(predictions), str(labels), "--quiet"]) == DONE  # the command replaces its own output
    assert capsys.readouterr().err == f"{mura.TERMS}\n"
    # The written studies.csv can be scored.
    assert score_json(capsys, folder / "studies.csv", labels)["overall"] == metrics["overall"]


def test_report_of_calls_only(tmp_path: Path, capsys) -> None:
    """The official format has no probabilities. The report states this."""
    predictions, labels = tables_of_confusions(SMALL)
    paths = write(tmp_path / "p.csv", predictions), write(tmp_path / "l.csv", labels)
    assert main(["score", *map(str, paths)]) == DONE
    metrics = json.loads((tmp_path / "p-score" / "metrics.json").read_bytes())
    assert metrics["overall"]["auroc"] is None
    assert f"{metrics['overall']['kappa']:.3f}" in (tmp_path / "p-score" / "report.html").read_text()
    assert "calls only" in capsys.readouterr().out


def test_json_without_out_writes_nothing(tmp_path: Path, capsys) -> None:
    paths = tables_with_probabilities(tmp_path)
    before = sorted(tmp_path.iterdir())
    metrics = score_json(capsys, *paths)
    assert sorted(tmp_path.iterdir()) == before
    assert score_json(capsys, *paths, "--out", tmp_path / "out") == metrics
    assert json.loads((tmp_path / "out" / "metrics.json").read_bytes()) == metrics


def test_report_needs_no_matplotlib(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tables_with_probabilities(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert score_json(capsys, *paths)["overall"]["num_studies"] == 120
    assert main(["score", *map(str, paths)]) == DONE
    assert (tmp_path / "p-score" / "report.html").exists()  # its plots need no package


def test_metrics_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("mura_dist.reports.evaluation.write", fail)
    predictions, labels = tables_with_probabilities(tmp_path)
    with pytest.raises(OSError, match="no space"):
        score.evaluate_predictions(predictions, labels, out=tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("file", ["recipe.toml", "predict.json", "predictions.csv"])
def test_other_commands_folders_are_not_overwritten(file: str, tmp_path: Path, capsys) -> None:
    predictions, labels = tables_with_probabilities(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("")
    laws.refusal(capsys, ["score", predictions, labels, "--out", tmp_path / "run"], file, "Pass another folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_inputs_are_not_overwritten(tmp_path: Path, capsys) -> None:
    predictions, labels = tables_with_probabilities(tmp_path)
    (tmp_path / "folder").mkdir()
    inside = predictions.rename(tmp_path / "folder" / "studies.csv")
    text = inside.read_text()
    laws.refusal(
        capsys,
        ["score", inside, labels, "--out", tmp_path / "folder"],
        "studies.csv is an input and would be overwritten",
    )
    laws.refusal(capsys, ["score", inside, labels, "--out", labels], "is a file. Pass a folder")
    assert inside.read_text() == text


def test_predictive_values_at_a_prevalence(tmp_path: Path, capsys) -> None:
    """The expected values are Bayes' rule for 1,000 studies, 100 of them abnormal."""
    metrics = score_json(capsys, *tables_with_probabilities(tmp_path), "--prevalence", "0.1")["overall"]
    hits, false_alarms = 100 * metrics["sensitivity"], 900 * (1 - metrics["specificity"])
    assert metrics["ppv_at_prevalence"] == pytest.approx(hits / (hits + false_alarms))
    assert metrics["npv_at_prevalence"] == pytest.approx((900 - false_alarms) / (900 - false_alarms + 100 - hits))
    assert metrics["prevalence_assumed"] == 0.1


# ---- comparison


def test_comparison_of_two_prediction_files(tmp_path: Path, capsys) -> None:
    a, labels = tables_with_probabilities(tmp_path, "a.csv", seed=1)
    b, _ = tables_with_probabilities(tmp_path, "b.csv", seed=2, noise=3)
    write(b, [line.split(",") for line in b.read_text().splitlines()[::-1]])  # another order
    assert main(["score", str(a), str(labels), "--against", str(b)]) == DONE
    out, _ = capsys.readouterr()
    metrics = json.loads((tmp_path / "a-score" / "metrics.json").read_bytes())
    comparison = metrics["comparison"]
    separate = {path: score_json(capsys, path, labels) for path in (a, b)}
    assert metrics["overall"] == separate[a]["overall"]
    assert metrics["against"]["file"] == "b.csv"
    for key in ("kappa", "auroc"):
        sides = [separate[path]["overall"][key] for path in (a, b)]
        assert [comparison["overall"][key][side] for side in "ab"] == pytest.approx(sides)
        assert comparison["overall"][key]["difference"] == pytest.approx(sides[0] - sides[1])
        assert (
            comparison["overall"][key]["low"]
            < comparison["overall"][key]["difference"]
            < comparison["overall"][key]["high"]
        )
    table = out[out.index("A - B") :]
    assert sum("confirmatory" in line for line in table.splitlines()) == 1
    assert "A is a.csv, B is b.csv." in table
    assert "not two recipes" in " ".join(table.split())
    assert max(map(len, out[: out.index("note: ")].splitlines())) <= 100


def test_comparison_with_calls_only_has_no_auroc(tmp_path: Path, capsys) -> None:
    a, labels = tables_with_probabilities(tmp_path, "a.csv")
    b = write(tmp_path / "b.csv", [line.split(",") for line in labels.read_text().splitlines()])
    comparison = score_json(capsys, a, labels, "--against", b)["comparison"]
    assert comparison["overall"]["auroc"] is None
    text = score.format_comparison(comparison, "a.csv", "b.csv")
    assert "AUROC: calls only" in text
    assert [line.split()[1] for line in text.splitlines()[1:4]] == ["kappa"] * 3


def test_second_file_is_validated_as_the_first(tmp_path: Path, capsys) -> None:
    a, labels = tables_with_probabilities(tmp_path, "a.csv")
    b = write(tmp_path / "b.csv", [line.split(",") for line in a.read_text().splitlines()[1:]])
    laws.refusal(capsys, ["score", a, labels, "--against", b], "b.csv: 1 study missing of the 120 of l.csv")


# ---- evaluate_predictions


def test_evaluate_predictions_equals_the_command(tmp_path: Path, capsys) -> None:
    """Frames, paths and strings give the metrics that `score` prints, apart from file names."""
    predictions, labels = tables_with_probabilities(tmp_path)
    frames = [
        pd.read_csv(path, header=None, names=["study", name])
        for path, name in ((predictions, "probability"), (labels, "label"))
    ]
    expected = score_json(capsys, predictions, labels)
    assert score.evaluate_predictions(str(predictions), labels) == expected
    for first, second in ((frames[0], frames[1]), (frames[0].set_index("study"), labels), (predictions, frames[1])):
        metrics = score.evaluate_predictions(first, second)
        assert metrics["overall"] == expected["overall"]
        assert metrics["by_study_type"] == expected["by_study_type"]
    metrics = score.evaluate_predictions(
        *frames, against=frames[0], threshold=0.3, prevalence=0.1, out=tmp_path / "out"
    )
    assert {role: metrics[role]["file"] for role in ("predictions", "labels", "against")} == {
        role: role for role in ("predictions", "labels", "against")
    }
    assert metrics["comparison"]["overall"]["kappa"]["difference"] == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_bytes()) == metrics


def test_evaluate_predictions_takes_booleans_and_missing_values() -> None:
    predictions = pd.DataFrame(
        {"study": list("abcd"), "call": [False, True, True, False], "band": [None, "", "x", "y"]}
    )
    labels = pd.DataFrame({"study": list("dcba"), "label": [0.0, 1.0, 1.0, 0.0], "patient": ["p", None, "q", "p"]})
    metrics = score.evaluate_predictions(predictions, labels)
    assert metrics["overall"]["kappa"] == 1
    assert metrics["overall"]["num_patients"] == 2
    assert metrics["overall"]["kappa_low"] is None
    assert metrics["overall"]["reasons"]["kappa_low"]


def test_evaluate_predictions_names_the_frame_in_errors() -> None:
    labels = pd.DataFrame({"study": ["a", "b"], "label": [0, 1]})
    with pytest.raises(UserError, match=r"predictions line 2: prediction '1.5' is outside \[0, 1\]"):
        score.evaluate_predictions(pd.DataFrame({"study": ["a", "b"], "probability": [0.5, 1.5]}), labels)
    with pytest.raises(UserError, match="labels holds predictions, not labels"):
        score.evaluate_predictions(labels.rename(columns={"label": "call"}), labels.rename(columns={"label": "call"}))
    with pytest.raises(UserError, match="predictions has no rows"):
        score.evaluate_predictions(pd.DataFrame({"study": [], "call": []}), labels)
