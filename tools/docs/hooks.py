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
HELP_WIDTH = 92
SETTINGS, COMMANDS, API = "<!-- settings -->", "<!-- commands -->", "<!-- api -->"
_OUTSIDE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
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
        table = ["| setting | default | values | what it does |", "| --- | --- | --- | --- |", *rows]
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
    names = [name for name in getattr(_import_from_checkout("mura_dist"), "__all__", ()) if not name.startswith("_")]
    return "\n\n".join(f"::: mura_dist.{name}" for name in names)


def _name_file(match: re.Match[str]) -> str:
    label, file = match[1], match[2]
    return f"`{file}`" if label.strip("`") in (file, Path(file).name) else f"{label} (`{file}`)"


def _setting_row(name: str, field: Any, trait: Any) -> str:
    text = str(field.description)
    if trait.CHANGEABLE in field.metadata:
        text += ". May change when a run is resumed"
    cells = (f"`{name}`", _default(field), _values(field), f"{text[:1].upper()}{text[1:]}.")
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: Any) -> str:
    """Return what values a field takes: its choices, or its type and bounds."""
    if choices := [choice for choice in get_args(field.annotation) if not isinstance(choice, (type, Enum))]:
        return ", ".join(f"`{choice}`" for choice in choices)
    if field.annotation is bool:
        return "`true`, `false`"
    names = {int: "integer", float: "number", str: "text"}
    bounds = [
        f"{sign} {bound:g}"
        for constraint in field.metadata
        for key, sign in _BOUNDS.items()
        if (bound := getattr(constraint, key, None)) is not None and bound <= _LARGEST_SHOWN
    ]
    return ", ".join([names.get(field.annotation, "text"), *bounds])


def _import_from_checkout(module: str) -> Any:
    """Import a module of the package beside this file, installed or not."""
    import importlib

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(module)
