"""Flags, YAML keys and environment variables, all derived from dataclasses.

A value comes from, in this order: its flag; its variable in the environment; the YAML file named by --config, which
has a section for each stage; the dataclass's default. pydantic checks and converts.

The variable of a section's field is CLIP_BATCH_<SECTION>_<FIELD>, such as CLIP_BATCH_EMBED_DEVICE. The section is not
said twice: `slurm_partition` of `slurm` is CLIP_BATCH_SLURM_PARTITION. Where only one section has a field of that
name, CLIP_BATCH_<FIELD> is read too, if the longer name is not set; a command's own argument has that name alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clip_batch import config
from clip_batch.config.fields import bounded_hints, default, helps, meaning, required, show
from clip_batch.config.values import NotAllowed, checked, rule
from clip_batch.errors import ConfigError, one_line

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
"""YAML section -> the dataclass it fills. The arguments of commands stand at the top of the file."""


def add_flags(parser: argparse.ArgumentParser, section: type, only: Sequence[str] | None = None) -> None:
    """Add a flag for each field (or those of `only`): --a-field, and --no-a-field for a bool.

    A field's metadata may say that it has a short flag too ("short"), is given by its place ("positional"), or is a
    list of which each flag gives one value ("repeat"). A flag of one value is refused where it is given again; "again"
    says what to do instead. In the environment spaces part the values of a list, but not of one of paths ("path").
    """
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if only is not None and field.name not in only:
            continue
        kind, value = hints[field.name], default(field)
        text = meaning(section, field.name).replace("%", "%%")
        shown = "" if value in ("", None, [], {}) else f" [{show(value)}]"
        settings: dict[str, Any] = {"help": text + shown, "default": argparse.SUPPRESS}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*" if typing.get_origin(kind) is list else "?", **settings)
            continue
        if kind in (bool, bool | None):
            settings["action"] = argparse.BooleanOptionalAction
        elif field.metadata.get("repeat"):
            settings.update(action="append", metavar=field.name.upper())
        elif typing.get_origin(kind) is list:
            settings.update(nargs="+", action="extend", metavar=field.name.upper())
        else:
            choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
            settings["metavar"] = "{" + ",".join(choices) + "}" if choices else field.name.upper()
            settings.update(action=Once, const=field.metadata.get("again", ""))
        short = [field.metadata["short"]] if "short" in field.metadata else []
        parser.add_argument(*short, _flag(field.name), dest=field.name, **settings)


class Once(argparse.Action):
    """Stores a value, and refuses a second: it would replace the first, though a reader may think that both hold.

    `const` is what its error adds, or "".
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{self.option_strings[-1]} is given more than once: give it once{self.const or ''}")
        setattr(namespace, self.dest, values)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def to_flags(section: Any) -> list[str]:
    """The flags that give a section's values where they differ from the defaults."""
    words: list[str] = []
    for field in dataclasses.fields(section):
        value, flag = getattr(section, field.name), _flag(field.name)
        if value == default(field):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"{flag}={item}" for item in items]  # one word each, whatever an item begins with
    return words


def to_environment(*sections: Any) -> dict[str, str]:
    """The environment variables that give all values of sections, for fields that are no lists."""
    environment = {}
    for section in sections:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            text = json.dumps(value) if value is None or isinstance(value, dict) else show(value)
            environment[variable(type(section), field.name)] = text
    return environment


def variable(section: type, field: str) -> str:
    """The environment variable of a field of a section, or of a command's own argument."""
    name = _name(section)
    prefix = "" if name is None or field.startswith(f"{name}_") else f"{name}_"
    return f"CLIP_BATCH_{prefix}{field}".upper()


def _name(section: type) -> str | None:
    """The YAML name of a section; None of a command's own arguments."""
    return next((name for name, known in SECTIONS.items() if known is section), None)


def read_file(path: str, arguments: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML configuration with the sections of SECTIONS and keys of `arguments`; ConfigError lists the valid ones."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that a mapping has twice: YAML's own loader takes the last one, and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if first := lines.get(str(key.value)):
                    raise ConfigError(f"{path} has {key.value!r} twice, in lines {first} and {line}: remove one")
                lines[str(key.value)] = line
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = "; save it as UTF-8 text" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError(f"--config {path} cannot be read: {one_line(error)}{remedy}") from None
    arguments = {*arguments}
    _check_keys(path, content, {*SECTIONS, *arguments})
    for name, section in SECTIONS.items():
        keys = {} if content.get(name) is None else content[name]
        if name in arguments and not isinstance(keys, dict):  # then it is the argument of that name
            continue
        _check_keys(f"{path}, section {name}", keys, _field_names(section), arguments)
    return dict(content)


def _field_names(section: type) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _check_keys(where: str, content: Any, valid: Iterable[str], arguments: Iterable[str] = ()) -> None:
    """ConfigError: a mapping has another key than `valid`; it says where the key belongs, if that is elsewhere."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a mapping: write `key: value` lines")
    for key in content:
        if key in valid:
            continue
        places = [f"`{name}:`" for name, known in SECTIONS.items() if key in _field_names(known)]
        if places or key in arguments:
            place = f"below {' or '.join(places)}, indented by two spaces" if places else "at the top of the file"
            raise ConfigError(f"{where} has no key {key!r}: write it {place}")
        raise ConfigError(f"{where} has no key {key!r}; valid: {', '.join(sorted(valid))}")


def gather(
    section: type,
    flags: Mapping[str, Any],
    file: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    arguments: Iterable[str] = (),
) -> Any:
    """One section's dataclass from flags, environment and file; ConfigError names the wrong or missing value.

    `arguments` are the names of the commands' own arguments, which have the short names of variables to themselves.
    """
    name = _name(section)
    keys = _keys(name, file)
    hints = typing.get_type_hints(section)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(section):
        if field.name in flags:
            values[field.name], sources[field.name] = flags[field.name], _flag(field.name)
        elif used := _used_variable(section, field.name, environ, arguments):
            text, kind = environ[used], hints[field.name]
            values[field.name], sources[field.name] = text, used
            if typing.get_origin(kind) is list:
                values[field.name] = _items(text, bool(field.metadata.get("repeat") or field.metadata.get("path")))
            if text == "null" and type(None) in typing.get_args(kind):  # as YAML and `to_environment` write None
                values[field.name] = None
        elif field.name in keys:
            values[field.name], sources[field.name] = keys[field.name], f"key {field.name} of --config"
        if typing.get_origin(hints[field.name]) is dict and isinstance(values.get(field.name), str):
            values[field.name] = _parse_json(values[field.name], sources[field.name])
        if typing.get_origin(hints[field.name]) is list and isinstance(values.get(field.name), str | int | float):
            values[field.name] = [values[field.name]]  # `input: a.tar` in a file
        if required(field) and values.get(field.name) in (None, "", []):
            text = helps(section)[field.name].rstrip(".")
            raise ConfigError(f"{_flag(field.name)} {field.name.upper()} is needed: {text[0].lower()}{text[1:]}")
    for field_name, value in values.items():
        kind = bounded_hints(section)[field_name]
        try:
            values[field_name] = _converted(value, hints[field_name], kind)
        except NotAllowed:
            wrong = f"{sources[field_name]} is {reprlib.repr(value)}: it must be {rule(kind, value)}"
            if isinstance(value, list) and sources[field_name] in environ and "," in environ[sources[field_name]]:
                wrong += "; in the environment a list has spaces, not commas, between its items"
            raise ConfigError(wrong) from None
    return section(**values)


def _converted(value: Any, plain: Any, bounded: Any) -> Any:
    """A value as a field's type, which is given without and with its bounds. NotAllowed: it cannot be one.

    pydantic converts what is of another type, such as a flag's text for a number; importing it takes a tenth of a
    second, which a command whose values are right as they are does not spend.
    """
    with contextlib.suppress(NotAllowed):
        return checked(value, bounded)
    import pydantic

    try:
        return checked(pydantic.TypeAdapter(plain).validate_python(value), bounded)
    except pydantic.ValidationError:
        raise NotAllowed from None


def _keys(name: str | None, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a section of a file, or (None) those of arguments: what has a section's name and is no mapping."""
    if name is None:
        return {key: value for key, value in file.items() if not (key in SECTIONS and isinstance(value, dict | None))}
    keys = file.get(name)
    return keys if isinstance(keys, dict) else {}


def _used_variable(section: type, field: str, environ: Mapping[str, str], arguments: Iterable[str]) -> str | None:
    """The variable that sets a field, if one does. ConfigError: it does not say of which section it is."""
    long, short = variable(section, field), f"CLIP_BATCH_{field.upper()}"
    if long in environ:
        return long
    if short not in environ:
        return None
    sharing = [variable(known, field) for known in SECTIONS.values() if field in _field_names(known)]
    if len(sharing) > 1 or field in arguments:
        if not environ[short]:  # a variable that was emptied sets nothing
            return None
        raise ConfigError(
            f"{short} does not say whose {field} it sets: set the one that is meant of {', '.join(sharing)}"
        )
    return short


def unknown_variables(arguments: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables CLIP_BATCH_... of the environment that no option reads, each with the nearest that one does.

    `arguments` are the names of the commands' own arguments.
    """
    known = {f"CLIP_BATCH_{name.upper()}" for name in arguments}
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            known |= {variable(section, field.name), f"CLIP_BATCH_{field.name.upper()}"}
    unknown = sorted(name for name in environ if name.startswith("CLIP_BATCH_") and name not in known)
    if not unknown:
        return {}
    from difflib import get_close_matches

    return {name: get_close_matches(name, known, 1, 0)[0] for name in unknown}


def _items(text: str, one: bool) -> list[Any]:
    """The list that a variable holds: as JSON, or as words between spaces; where `one`, the text is one value."""
    with contextlib.suppress(ValueError):
        if isinstance(items := json.loads(text), list):
            return items
    return [text] if one else text.split()


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
