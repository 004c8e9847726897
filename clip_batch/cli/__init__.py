"""The command line `clip-batch COMMAND`; each command is a function that imports its stage when it runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence

from clip_batch.cli.arguments import escape_output, say
from clip_batch.cli.commands import COMMANDS
from clip_batch.cli.parser import Command, call
from clip_batch.config import extras
from clip_batch.errors import ClipBatchError, ConfigError, Preempted, one_line

__all__ = ["COMMANDS", "main"]


def _usage(names: Iterable[str] = COMMANDS) -> str:
    lines = [
        "usage: clip-batch COMMAND [--help] ...",
        "",
        "Plan, embed, merge and search image-text data with CLIP.",
        "",
    ]
    lines += [f"  {name:<23}{(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    lines += ["", "Exit codes: 0 all committed; 1 something failed; 2 usage or configuration; 75 stopped, run again."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default the one of `sys.argv`; the exit code."""
    escape_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    name, rest = " ".join(arguments[:1]), arguments[1:]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    try:
        code = _run(name, rest)
        if sys.stdout:  # None where it was closed before the start (`>&-`): nobody reads
            sys.stdout.flush()  # so that a reader who has left (`| head`) is met here, not while the interpreter ends
        return code
    except ClipBatchError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"clip-batch {name}: {Preempted()}", file=sys.stderr)
        return Preempted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        remedy = extras.remedy(error.name, name)
        if debug or remedy is None:
            raise
        print(f"clip-batch {name}: it needs {error.name}, which is not installed: {remedy}", file=sys.stderr)
        return 2
    except ImportError as error:  # of two libraries that do not go together, as pyarrow 26 and numpy 1
        if debug:
            raise
        print(f"clip-batch {name}: {one_line(error)}: pip install --upgrade the one that is too old", file=sys.stderr)
        return 2
    except OSError as error:
        if debug:
            raise
        print(f"clip-batch {name}: {error} (--debug shows where)", file=sys.stderr)
        return 1


def _announced(name: str) -> Command:
    """A command that says at once, on a terminal, that it loads libraries, if that takes seconds."""
    command = COMMANDS[name]

    @functools.wraps(command)
    def run(**options: object) -> int:
        if name in extras.NEEDS and sys.stderr and sys.stderr.isatty():
            say(f"clip-batch {name}: its libraries are being loaded")
        return command(**options)

    return run


def _run(name: str, arguments: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(_usage())
        return 0 if name else 2
    if name == "--version":
        from clip_batch import __version__

        print(f"clip-batch {__version__}")
        return 0
    if kinds := [command for command in COMMANDS if command.startswith(f"{name} ")]:
        if {"-h", "--help"} & {*arguments}:
            print(_usage(kinds))
            return 0
        raise ConfigError(f"say which: clip-batch {', or clip-batch '.join(kinds)}; see --help of each")
    if name not in COMMANDS:
        raise ConfigError(f"no such command; the commands are {', '.join(COMMANDS)}")
    return call(f"clip-batch {name}", _announced(name), arguments, COMMANDS.values(), main)
