"""Hooks of the documentation site, called by mkdocs (mkdocs.yml names this file).

<!-- settings -->    becomes one table for each group of training settings, from the fields of Settings
<!-- commands -->    becomes the --help of each command
<!-- api -->         becomes the reference of each public name of the package
[label](../FILE)     becomes the file's name: a file outside docs/ is no page of the site
"""

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
HELP_WIDTH = 80
SETTINGS, COMMANDS, API = "<!-- settings -->", "<!-- commands -->", "<!-- api -->"
_OUTSIDE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_SIGNS = {"ge": "&ge;", "gt": "&gt;", "le": "&le;", "lt": "&lt;"}
_LARGEST_SHOWN = 10**6  # a bound beyond it guards a data type and tells a reader nothing


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's Markdown with its placeholders and outside links replaced."""
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, settings_markdown())
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands_markdown())
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
    """Return a heading and the --help of each command, in the order of the alphabet."""
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
