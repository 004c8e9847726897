"""Call a command with what its parameters name: the flags, the file, the environment and the defaults of each section.

A command is a function whose parameters are annotated with dataclasses: the arguments of its own, and sections of
the configuration. `Annotated[Section, Only(("name", ...))]` takes a section of which the command has these flags alone,
and `Without` one of which it lacks them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NoReturn

from clip_batch.cli.arguments import CommandLine, Only, Without
from clip_batch.errors import ConfigError

Command = Callable[..., int]


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass that a command takes, and the names of its fields that are flags of the command."""

    kind: type
    flags: tuple[str, ...]


def sections(command: Command) -> dict[str, Section]:
    """The sections that a command takes, by the names of its parameters."""
    taken: dict[str, Section] = {}
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(kind):
            every = tuple(field.name for field in dataclasses.fields(kind))
            only = next((extra.flags for extra in extras if isinstance(extra, Only)), every)
            without = next((extra.flags for extra in extras if isinstance(extra, Without)), ())
            flags = tuple(flag for flag in only if flag not in without)
            taken[name] = Section(typing.cast(type, kind), flags)
    return taken


def argument_names(commands: Iterable[Command]) -> set[str]:
    """The fields of the commands' own arguments, which are the keys at the top of a configuration file."""
    from clip_batch.config.options import SECTIONS

    kinds = {section.kind for command in commands for section in sections(command).values()} - {*SECTIONS.values()}
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


_CONFIG = "YAML file of options; see configs/reference.yaml"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        given = list(arg_strings)
        values = super()._get_values(action, arg_strings)
        if values == [] and given == ["--"]:  # Python before 3.13 loses this value of --flag=--
            return given if action.nargs else given[0]
        return values


def call(
    prog: str, command: Command, words: Sequence[str], commands: Iterable[Command], main: CommandLine | None = None
) -> int:
    """Run `command` with the options of `words`; its exit code. ConfigError: an option is wrong.

    `commands` are all that may share its configuration file. A parameter `main` is given the command line itself.
    """
    from clip_batch.config import options

    taken = sections(command)
    parser = _Parser(prog=prog, description=command.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", action=options.Once, help=_CONFIG)
    parser.add_argument("--debug", action="store_true", help="show a traceback where an error is raised")
    for section in taken.values():
        options.add_flags(parser, section.kind, section.flags)
    flags = vars(parser.parse_intermixed_args(words))  # flags may stand before what is given by its place
    commands = list(commands)
    for name, nearest in options.unknown_variables(argument_names(commands)).items():
        print(f"{prog}: no option reads the environment's {name}; the nearest is {nearest}", file=sys.stderr)
    file = options.read_file(flags["config"], argument_names(commands)) if flags["config"] else {}
    values: dict[str, Any] = {"main": main} if "main" in typing.get_type_hints(command) else {}
    for name, section in taken.items():
        own = {flag: value for flag, value in flags.items() if flag in section.flags}
        others = argument_names(commands) if section.kind in options.SECTIONS.values() else ()
        values[name] = options.gather(section.kind, own, file, arguments=others)
    return command(**values)
