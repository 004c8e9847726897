"""Flags, YAML keys, environment variables and their documents, all derived from config.py.

A value comes from, in this order: its flag, CLIP_BATCH_<FIELD> in the environment, the YAML file
named by --config (a section a stage), the dataclass's default. pydantic checks and converts.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import os
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from clip_batch import config
from clip_batch.errors import ConfigError

SECTIONS: dict[str, type] = {
    "storage": config.StorageConfig,
    "download": config.DownloadConfig,
    "plan": config.PlanConfig,
    "embed": config.EmbedConfig,
    "merge": config.MergeConfig,
    "sweep": config.SweepConfig,
    "submit": config.SubmitConfig,
    "slurm": config.SlurmConfig,
    "spark": config.SparkConfig,
    "search": config.SearchConfig,
    "serve": config.ServeConfig,
    "database": config.DatabaseConfig,
}
"""YAML section -> the dataclass it fills. TargetConfig's fields stand at the top of the file."""


@functools.cache
def helps(section: type) -> dict[str, str]:
    """Field name -> the string beneath it in the source, on one line."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]).body
    found = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[typing.cast(ast.Name, field.target).id] = " ".join(str(text.value.value).split())
    return found


def default(field: dataclasses.Field[Any]) -> Any:
    """A field's default value."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def add_flags(parser: argparse.ArgumentParser, section: type, only: Sequence[str] | None = None) -> None:
    """Add a flag for each field (or those of `only`): --a-field, and --no-a-field for a bool."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if only is not None and field.name not in only:
            continue
        kind, value = hints[field.name], default(field)
        text = helps(section)[field.name].replace("%", "%%")
        shown = "" if value in ("", None, [], {}) else f" [{_show(value)}]"
        settings: dict[str, Any] = {"dest": field.name, "help": text + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            settings.update(nargs="+", action="extend", metavar=field.name.upper())
        else:
            choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
            settings["metavar"] = "{" + ",".join(choices) + "}" if choices else field.name.upper()
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def to_flags(section: Any) -> list[str]:
    """The flags that give a section's values where they differ from the defaults."""
    words: list[str] = []
    for field in dataclasses.fields(section):
        value, flag = getattr(section, field.name), field.name.replace("_", "-")
        if value == default(field):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{flag}={item}" for item in items]  # one word each, whatever an item begins with
    return words


def _show(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def read_file(path: str) -> dict[str, Any]:
    """A YAML configuration, its names checked; ConfigError lists the valid ones."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    _known(path, found, [*SECTIONS, *(field.name for field in dataclasses.fields(config.TargetConfig))])
    for name, section in SECTIONS.items():
        _known(f"{path}, section {name}", found.get(name) or {}, [field.name for field in dataclasses.fields(section)])
    return dict(found)


def _known(where: str, found: Any, valid: list[str]) -> None:
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no mapping: write `key: value` lines")
    for key in found:
        if key not in valid:
            raise ConfigError(f"{where} has no key {key!r}; valid: {', '.join(sorted(valid))}")


def gather(
    section: type, flags: Mapping[str, Any], file: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> Any:
    """One section's dataclass from flags, environment and file; ConfigError names the wrong value."""
    import pydantic

    name = next((name for name, known in SECTIONS.items() if known is section), None)
    inner = {key: value for key, value in file.items() if key not in SECTIONS} if name is None else file.get(name) or {}
    hints = typing.get_type_hints(section)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(section):
        variable = f"CLIP_BATCH_{field.name.upper()}"
        if field.name in flags:
            values[field.name], sources[field.name] = flags[field.name], f"--{field.name.replace('_', '-')}"
        elif variable in environ:
            values[field.name], sources[field.name] = _split(environ[variable], hints[field.name]), variable
        elif field.name in inner:
            values[field.name], sources[field.name] = inner[field.name], f"key {field.name} of --config"
        if typing.get_origin(hints[field.name]) is dict and isinstance(values.get(field.name), str):
            values[field.name] = _parse_json(values[field.name], sources[field.name])
    try:
        return pydantic.TypeAdapter(section).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = sources.get(str(first["loc"][0]), section.__name__)
        raise ConfigError(f"{where} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _split(text: str, kind: Any) -> Any:
    return text.split() if typing.get_origin(kind) is list else text


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None


def reference_yaml() -> str:
    """configs/reference.yaml: every key with its default and its meaning."""
    import yaml

    lines = ["# Every key with its default. Generated by `make docs`; give a file like this as --config.", ""]
    for name, section in SECTIONS.items():
        lines += [f"# {' '.join((section.__doc__ or '').split())}", f"{name}:"]
        for field in dataclasses.fields(section):
            value = yaml.safe_dump({field.name: default(field)}, default_flow_style=True, width=1000).strip()[1:-1]
            lines += [f"  # {helps(section)[field.name]}", f"  {value}"]
        lines.append("")
    return "\n".join(lines)


def reference_markdown() -> str:
    """docs/config.md: the same as tables."""
    lines = [
        "# Options",
        "",
        "Generated by `make docs`. A flag `--a-field` is the YAML key `a_field` of its section in",
        "`--config FILE` and the environment variable `CLIP_BATCH_A_FIELD`; flags win over the",
        "environment, the environment over the file.",
        "",
    ]
    for name, section in {"(top of the file)": config.TargetConfig, **SECTIONS}.items():
        lines += [
            f"## {name}",
            "",
            " ".join((section.__doc__ or "").split()),
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for field in dataclasses.fields(section):
            value = _show(default(field)).replace("|", "\\|")
            lines.append(
                f"| `{field.name}` | {f'`{value}`' if value else ''} | {helps(section)[field.name]} |".replace(
                    "|  |", "| |"
                )
            )
        lines.append("")
    return "\n".join(lines)
