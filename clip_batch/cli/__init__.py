"""The command line: `clip-batch COMMAND`. Each command is one function, imported when it is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from clip_batch.cli.arguments import Options
from clip_batch.cli.commands import COMMANDS, Command
from clip_batch.config import StorageConfig, TargetConfig, extras
from clip_batch.errors import ClipBatchError, ConfigError

__all__ = ["COMMANDS", "main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")


def _parser(name: str, command: Command) -> _Parser:
    from clip_batch.config import options

    parser = _Parser(prog=f"clip-batch {name}", description=command.run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; see configs/reference.yaml")
    parser.add_argument("--debug", action="store_true", help="show a traceback where an error is raised")
    if name == "demo":
        parser.add_argument("folder", nargs="?", default=argparse.SUPPRESS, help=options.helps(TargetConfig)["folder"])
    options.add_flags(parser, TargetConfig, command.fields)
    for section in (*command.sections, StorageConfig):
        options.add_flags(parser, section)
    for section, only in command.fewer:
        options.add_flags(parser, section, only)
    if name in ("search", "filter"):
        parser.add_argument("-k", dest="k", default=argparse.SUPPRESS, help="short for --k")
    return parser


def _usage() -> str:
    lines = ["usage: clip-batch COMMAND [--help] ...", "", (__doc__ or "").split("\n")[0], ""]
    lines += [f"  {name:<23}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "Exit codes: 0 all committed; 1 something failed; 2 usage or configuration; 75 run again."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from clip_batch import __version__

        print(f"clip-batch {__version__}")
        return 0
    debug = "--debug" in arguments
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    try:
        return _run(name, rest)
    except ClipBatchError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        mend = extras.mend(error.name)
        if debug or mend is None:
            raise
        print(f"clip-batch {name}: it needs {error.name}, which is not installed: {mend}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error} (--debug shows where)", file=sys.stderr)
        return 1


def _run(name: str, arguments: list[str]) -> int:
    if kinds := [command for command in COMMANDS if command.startswith(f"{name} ")]:
        raise ConfigError(f"say which: clip-batch {', or clip-batch '.join(kinds)}; see --help of each")
    if name not in COMMANDS:
        raise ConfigError(f"no such command; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    flags = vars(_parser(name, command).parse_args(arguments))
    from clip_batch.config import options

    file = options.read_file(flags["config"]) if flags["config"] else {}
    used = (TargetConfig, StorageConfig, *command.sections, *(section for section, _ in command.fewer))

    def fill(section: type) -> Any:
        return options.gather(section, flags, file) if section in used else section()

    sections = {name: fill(section) for name, section in options.SECTIONS.items()}
    return command.run(Options(target=fill(TargetConfig), main=main, **sections))
