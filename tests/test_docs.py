"""Test README.md and docs/: limits, links, the site, and every snippet that a reader may copy.

Snippets: `<!-- run -->` before a sh block of docs/getting-started.md marks commands that run in an empty folder. All Python
blocks of the pages in PYTHON_PAGES run after them in the same folder. The blocks of a page run as one script.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers.commands import BIN, NO_GPU, ROOT
from helpers.tools import tool

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "shards/README.md"))]
PYTHON_PAGES = ("getting-started.md", "api.md")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TERMS = "Research only, not a medical device; a disclaimer does not make clinical use lawful."
_FENCE = re.compile(r"^```.*?^```[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

hooks = tool("docs/hooks")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8").replace(hooks.SETTINGS, hooks.settings_markdown())
    return {anchor(heading) for heading in re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", text), re.MULTILINE)}


def relative_links() -> Iterator[tuple[Path, str]]:
    for page in TEXTS:
        for target in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            if not re.match(r"[a-z]+:", target):
                yield page, target


# ---- README.md


def test_readme_is_at_most_120_lines_of_100_columns_with_one_local_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []
    [picture] = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert picture.startswith("docs/")
    assert (ROOT / picture).is_file()
    assert TERMS in "\n".join(lines[:10])


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("bash launch/demo.sh", "bash tests/run.sh"):
        assert re.search(rf"^{re.escape(command)}\b", text, re.MULTILINE), command


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_quick_start_shows_the_lines_that_the_demo_prints(page: str) -> None:
    """The numbers are those of docs/benchmarks.md. The text is printed by the demo's own function."""
    overall = {
        "auroc": 0.961,
        "auroc_low": 0.935,
        "auroc_high": 0.983,
        "kappa": 0.806,
        "kappa_low": 0.740,
        "kappa_high": 0.865,
    }
    facts = {"auroc_untrained": 0.485, "num_studies": 308, "trained_on": "phantoms", "seconds_total": 304}
    lines = tool("demo/summary").lines(Path("runs/demo"), facts, overall, "data/phantoms/valid")
    assert "```text\n" + "\n".join(lines) + "\n```\n" in (ROOT / page).read_text(encoding="utf-8")
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert "0.961 [0.935, 0.983]; untrained 0.485 | 0.806 [0.740, 0.865]" in measured
    assert "5 min 4 s" in measured


def test_results_of_readme_are_in_the_benchmarks() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.partition("## Results")[2].partition("\n## ")[0].splitlines()[4:]]
    results = [row[1] for row in rows if len(row) == 3]
    assert len(results) >= 5
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    numbers = {number for result in results for number in re.findall(r"\d+\.\d+|\d+ min \d+ s", result)}
    assert {number for number in numbers if number not in measured} == set()


# ---- links


def test_relative_links_lead_to_files_and_headings() -> None:
    missing = []
    for page, target in relative_links():
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (fragment and file.suffix == ".md" and fragment not in anchors(file)):
            missing.append((page.relative_to(ROOT).as_posix(), target))
    assert missing == []


def test_every_picture_of_docs_is_linked() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page, target in relative_links()}
    assert [path.name for path in sorted(DOCS.glob("*.png")) if path not in linked] == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_page_has_one_title_and_no_machine_paths(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^# ", _FENCE.sub("", text), re.MULTILINE)) == 1
    assert re.findall(r"/(?:root|work|opt|tmp/h)/", text) == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_prose_has_few_colons_and_semicolons(page: Path) -> None:
    """At most one in three sentences has a colon or a semicolon. Tables and code are not counted."""
    text = re.sub(r"\]\([^)]*\)", "]", without_code(page.read_text(encoding="utf-8")))
    prose = " ".join(line for line in text.splitlines() if not line.startswith(("#", "|", "!", "<")))
    sentences = len(re.findall(r"[.!?](?:\s|$)", prose))
    assert len(re.findall(r"[:;](?:\s|$)", prose)) <= max(1, 0.35 * sentences)


# ---- the site


class _Resources(HTMLParser):
    """Addresses that a browser loads automatically to show a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and values.get("rel") != "canonical"):
            self.addresses += [value for key in ("src", "href") if (value := values.get(key))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site and return its folder."""
    program = shutil.which("mkdocs", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs mkdocs: bash launch/setup.sh docs")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [program, "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def test_site_builds_without_warnings_and_loads_no_remote_resource(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} == {page.stem for page in PAGES} | {"404"}
    remote = {
        (page.name, address)
        for page in pages
        for address in _Resources(page.read_text(encoding="utf-8")).addresses
        if re.match(r"(https?:)?//", address)
    }
    assert remote == set()


def test_site_lists_every_setting_command_and_public_name(site: Path) -> None:
    import mura_dist
    from mura_dist.cli.main import cli
    from mura_dist.core.config import Settings

    training, commands, api = (
        (site / f"{name}.html").read_text(encoding="utf-8") for name in ("training", "commands", "api")
    )
    assert [name for name in Settings.model_fields if f"<td><code>{name}</code></td>" not in training] == []
    assert [name for name in cli.commands if f'id="mura-dist-{name}"' not in commands] == []
    assert [name for name in mura_dist.__all__ if name[0] != "_" and f'id="mura_dist.{name}"' not in api] == []


@pytest.mark.parametrize(
    ("markdown", "rendered"),
    [
        ("[launch/nginx.conf](../launch/nginx.conf)", "`launch/nginx.conf`"),
        ("[`mura.toml`](../launch/recipes/mura.toml)", "`launch/recipes/mura.toml`"),
        ("[how to report](../SECURITY.md)", "how to report (`SECURITY.md`)"),
        ("[Train](training.md#stop)", "[Train](training.md#stop)"),
    ],
)
def test_link_out_of_docs_becomes_a_file_name_on_the_site(markdown: str, rendered: str) -> None:
    assert hooks.on_page_markdown(markdown) == rendered


def test_list_of_errors_is_complete() -> None:
    folders = {path.parent.name for path in (ROOT / "mura_dist").glob("*/__init__.py")}
    assert folders == hooks.AREAS.keys()
    table = hooks.errors_markdown()
    for folder in folders:
        for text in hooks.error_texts(ROOT / "mura_dist" / folder):
            problem, remedy = hooks.split_message(text)
            row = f"| {hooks._escape(problem)} | {hooks._escape(remedy)} |"
            assert row in table or not re.search(r"[A-Za-z]{2}", problem), row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--size SIZE is too small (32). Give a larger one", ("--size SIZE is too small (32)", "Give a larger one")),
        ("PATH is a folder; give a file", ("PATH is a folder", "Give a file")),
        ("the disk is full. --out DIR on another disk works.", ("the disk is full", "--out DIR on another disk works")),
        ("it is not there (cpu; cuda). Install it", ("it is not there (cpu; cuda)", "Install it")),
        ("stopped at a step", ("stopped at a step", "")),
    ],
)
def test_message_is_split_into_problem_and_remedy(text: str, message: tuple[str, str]) -> None:
    assert hooks.split_message(text) == message


# ---- snippets


def blocks(page: Path, pattern: str) -> list[str]:
    return re.findall(rf"^{pattern}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def snippet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the commands of docs/getting-started.md have run."""
    folder = tmp_path_factory.mktemp("snippets")
    [commands] = blocks(DOCS / "getting-started.md", "<!-- run -->\n```sh")
    script = commands.replace("source .venv/bin/activate\n", "")
    assert script != commands
    run_script(["bash", "-euc", script], folder)
    shutil.copy(folder / "runs" / "bones" / "model.onnx", folder / "model.onnx")
    radiograph = sorted((folder / "data" / "bones" / "valid").rglob("*.png"))[0]
    shutil.copy(radiograph, folder / "radiograph.png")
    return folder


def run_script(command: list[str], folder: Path) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **NO_GPU, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_snippets_of_a_page_run_in_order(page: str, snippet_folder: Path) -> None:
    """They run as one plain script, which starts processes without a main guard."""
    snippets = blocks(DOCS / page, "```python")
    assert snippets
    script = snippet_folder / f"{page.removesuffix('.md')}.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    run_script([sys.executable, str(script)], snippet_folder)


def test_every_page_with_python_is_tested() -> None:
    """Each page with Python blocks runs in this file or in the test named below."""
    elsewhere = {"data.md"}  # tests/data/shards/test_shards.py
    assert {page.name for page in PAGES if blocks(page, "```python")} == {*PYTHON_PAGES, *elsewhere}


# ---- project files


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_scripts_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    scripts = re.findall(r"(?:bash|python) ((?:[\w.]+/)+[\w.]+)", "\n".join(commands))
    assert scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values() if "needs" not in job)


def test_issue_forms_ask_for_the_environment_and_refuse_radiographs() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in forms}
    assert all(yaml.safe_load(text) for text in texts.values())
    assert "environment.json" in texts["bug"]
    assert all("Attach no radiograph" in texts[name] for name in ("bug", "idea"))


def test_pre_commit_hooks_exist() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"] if "entry" in hook]
    scripts = [word for entry in entries for word in entry.split() if word.endswith(".py")]
    assert scripts == ["tools/hooks/refuse_radiographs.py"]
    assert (ROOT / scripts[0]).is_file()


def test_citation_has_the_version_and_no_address() -> None:
    import mura_dist

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mura_dist.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "mura_dist contributors"}]
    assert not {"url", "repository-code", "doi"} & citation.keys()


def test_changelog_follows_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert all(
        re.fullmatch(r"## \[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|not yet released)", line) for line in versions[1:]
    )
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    body = lines[lines.index(versions[0]) :]
    assert [line for line in body if line and not line.startswith(("#", "- "))] == []  # one change, one line
    assert [line for line in body if len(line) > 125] == []
    assert [line for line in body if re.search(r"\d (GB|MB|MiB|GiB|images/s)\b", line)] == []
