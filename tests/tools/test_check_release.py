"""tools/check_release.py: which tags may be released."""

import pytest
from helpers.tools import tool

release = tool("check_release")
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n## [0.1.0] - not yet released\n"


def test_tag_of_a_dated_version_is_released() -> None:
    assert release.problem("v1.2.0", "1.2.0", CHANGELOG) == ""


@pytest.mark.parametrize(
    ("tag", "version", "text"),
    [
        ("v1.2.1", "1.2.0", "the tag is v1.2.1, the package's version 1.2.0"),
        ("v0.1.0", "0.1.0", "gives 0.1.0 no date: '## [0.1.0] - not yet released'"),
        ("v2.0.0", "2.0.0", "has no section of 2.0.0"),
    ],
)
def test_tags_without_version_or_date_are_refused(tag: str, version: str, text: str) -> None:
    assert text in release.problem(tag, version, CHANGELOG)


def test_command_exits_with_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["v0.0.0"]) == 1
    assert capsys.readouterr().err.startswith("check_release: the tag is v0.0.0")
