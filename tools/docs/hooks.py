"""Hooks of the documentation site, called by mkdocs (mkdocs.yml names this file).

<!-- settings -->    becomes one table for each group of training settings, from the fields of Settings
<!-- commands -->    becomes the --help of each command
<!-- api -->         becomes the reference of each public name of the package
<!-- errors -->      becomes a table of each folder's error messages, from the sources
[label](../FILE)     becomes the file's name: a file outside docs/ is no page of the site
"""

import ast
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
HELP_WIDTH = 80
SETTINGS, COMMANDS, API, ERRORS = "<!-- settings -->", "<!-- commands -->", "<!-- api -->", "<!-- errors -->"
ERROR_NAMES = {
    "UserError",
    "RunError",
    "RankLocalUserError",
    "CollectiveRunError",
    "ShardReadError",
    "StopRequestedError",
}
AREAS = {
    "cli": "Any command",
    "core": "Files, URLs and settings",
    "data": "Radiographs and shards",
    "distributed": "Ranks",
    "training": "Training and checkpoints",
    "models": "Models",
    "evaluation": "Evaluate and score",
    "metrics": "Operating points",
    "inference": "Export, predict and the page",
    "reports": "Reports",
    "bench": "Benchmarks",
}
_OUTSIDE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_WORD = re.compile(r"\b[a-z]{2,}\b")
_SIGNS = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}
_MIN_WORDS = 3  # a message of fewer words of its own is composed elsewhere
_LARGEST_SHOWN = 10**6  # a bound beyond it guards a data type and tells a reader nothing


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's Markdown with its placeholders and outside links replaced."""
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, settings_markdown())
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands_markdown())
    if ERRORS in markdown:
        markdown = markdown.replace(ERRORS, errors_markdown())
    if API in markdown:
        markdown = markdown.replace(API, api_markdown())
    return _OUTSIDE_LINK.sub(_name_file, markdown)


def settings_markdown() -> str:
    """Return a heading and a table for each group of settings of `mura-dist train`."""
    config = _import_from_checkout("mura_dist.core.config")
    sections = []
    for group in config.Group:
        fields = {name: field for name, field in config.Settings.model_fields.items() if group in field.metadata}
        rows = [_setting_row(name, field, config.Trait) for name, field in fields.items()]
        table = ["| setting | default, values | what it does |", "| --- | --- | --- |", *rows]
        sections.append("\n".join([f"### {group.value.capitalize()}", "", *table]))
    return "\n\n".join(sections)


def commands_markdown() -> str:
    """Return a heading and the --help of each command, in alphabetical order."""
    import click

    cli = _import_from_checkout("mura_dist.cli.main").cli
    root = click.Context(cli, info_name="mura-dist", max_content_width=HELP_WIDTH, terminal_width=HELP_WIDTH)
    sections = []
    for name in sorted(cli.commands):
        command = cli.commands[name]
        context = click.Context(
            command, parent=root, info_name=name, max_content_width=HELP_WIDTH, terminal_width=HELP_WIDTH
        )
        sections.append(f"## mura-dist {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(sections)


def api_markdown() -> str:
    """Return one directive of mkdocstrings for each name that the package exports."""
    names = [name for name in _import_from_checkout("mura_dist").__all__ if not name.startswith("_")]
    names.sort(key=lambda name: (name.endswith("Error"), name[0].isupper(), name))  # functions, classes, errors
    return "\n\n".join(f"::: mura_dist.{name}" for name in names)


def errors_markdown() -> str:
    """Return a heading and a table of messages and remedies for each folder of the package."""
    sections = []
    for folder, title in AREAS.items():
        messages = sorted({split_message(text) for text in error_texts(ROOT / "mura_dist" / folder)})
        rows = [
            f"| {_escape(problem)} | {_escape(remedy)} |"
            for problem, remedy in messages
            if _WORD.search(problem.lower())
        ]
        if rows:
            sections.append("\n".join([f"### {title}", "", "| error | fix |", "| --- | --- |", *rows]))
    return "\n\n".join(sections)


def error_texts(folder: Path) -> Iterator[str]:
    """Yield the message of each error that the modules of a folder raise, with `NAME` in capitals for a value."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            text = _template(node.args[0], constants) if name in ERROR_NAMES else ""
            if len(_WORD.findall(text)) >= _MIN_WORDS:
                yield text


def split_message(text: str) -> tuple[str, str]:
    """Return what is wrong and the remedy, both from one message."""
    for end in re.finditer(r"[;.] ", text):
        problem, remedy = text[: end.start()], text[end.end() :].rstrip(".")
        if problem.count("(") == problem.count(")"):
            first = remedy.partition(" ")[0]
            return problem, remedy if re.search(r"[/=.`-]", first) else f"{remedy[:1].upper()}{remedy[1:]}"
    return text.rstrip("."), ""


def _constants(tree: ast.Module) -> dict[str, str]:
    """Return the texts and numbers that a module assigns to names of its own."""
    return {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _template(node: ast.expr, constants: dict[str, str]) -> str:
    """Return the text of a string expression. A value becomes its name in capitals, an expression an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return _template(node.left, constants) + _template(node.right, constants)
    if isinstance(node, ast.JoinedStr):
        text = ""
        for piece in node.values:
            # A value that follows a word without a space is an optional end of it.
            is_suffix = isinstance(piece, ast.FormattedValue) and re.search(rf"[A-Za-z0-9{_ELLIPSIS}]$", text)
            text += "" if is_suffix else _template(piece, constants)
        return text
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "install_remedy":
        commands = [f"`pip install '.[{_template(extra, constants)}]'`" for extra in value.args]
        return f"{' or '.join(commands)} in the checkout"
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return constants.get(name) or name.strip("_").upper() or _ELLIPSIS


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a cell of a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"([*_\[\]{}\\])(?=(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", text)


def _name_file(match: re.Match[str]) -> str:
    label, file = match[1], match[2]
    return f"`{file}`" if label.strip("`") in (file, Path(file).name) else f"{label} (`{file}`)"


def _setting_row(name: str, field: Any, trait: Any) -> str:
    text = str(field.description)
    if trait.CHANGEABLE in field.metadata:
        text += ". May change when a run is resumed"
    values = "<br>".join(filter(None, (_default(field), _values(field))))
    cells = (f"`{name}`", values, f"{text[:1].upper()}{text[1:]}.")
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: Any) -> str:
    """Return the values that a field takes beside its default: other choices, or a number's type and bounds."""
    if choices := [choice for choice in get_args(field.annotation) if not isinstance(choice, (type, Enum))]:
        return f"or {', '.join(f'`{choice}`' for choice in choices if choice != field.default)}"
    if field.annotation not in (int, float):
        return ""
    bounds = {
        key: bound
        for constraint in field.metadata
        for key in _SIGNS
        if (bound := getattr(constraint, key, None)) is not None and bound <= _LARGEST_SHOWN
    }
    kind = "integer" if field.annotation is int else "number"
    if bounds.keys() == {"ge", "le"}:
        return f"{kind}, {bounds['ge']:g} to {bounds['le']:g}"
    return " and ".join([f"{kind} {_SIGNS[key]}&nbsp;{bound:g}" for key, bound in bounds.items()]) or kind


def _import_from_checkout(module: str) -> Any:
    """Import a module of the package beside this file, installed or not."""
    import importlib

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(module)
