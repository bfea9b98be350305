"""What every command shares: one clear line on bad input, and exit codes that scripts can rely on.

Exit codes: 0 done, 1 some inputs failed, 2 bad usage or input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from argparse import Action
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from engine.io import early
from engine.io.version import version

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # no space left, none left for this user, broken


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. After a plain KeyboardInterrupt inside exec() Python ends itself by SIGINT, whatever the exit code."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it unwinds the stack, so that clean-up runs."""


asked = 0  # the signal that has asked this process to end: an import may swallow the exception, and the work begins


def _end(number: int, frame: FrameType | None) -> NoReturn:
    global asked
    asked = number
    raise Interrupted if number == signal.SIGINT else Terminated


class Failed(RuntimeError):
    """The work was begun and could not be finished, through no fault of the input: exit code 1."""


_TYPES = {"int": "integer", "float": "number", "PositiveInt": "integer, 1 or more", "ClosedUnitInterval": "0 to 1"}


class HelpFormatter(DefaultHelpFormatter):
    """What is expected and the default after each text: no types of Python, no defaults that say nothing."""

    def _get_type_str(self, action: Action) -> str:
        name = super()._get_type_str(action) or ""
        return _TYPES.get(name.removesuffix(" | null"), "")

    def _expand_help(self, action: Action) -> str:
        text = re.sub(r"type: (, )?", "", super()._expand_help(action))
        text = re.sub(r"(, )?default: (null|False|\[\]|\{\})?(?=\))", "", text)
        return re.sub(r"(, )?\)$", ")", text).replace(" ()", "")


_WRONG = re.compile(r'Parser key "(.+?)": Expected a (?:<class \'(\w+)\'>|typing\.Literal\[(.+?)\])\. Got value: (.*)')


def _plainly(message: str) -> str:
    """jsonargparse's words about a value of another type, without those of Python."""
    line = " ".join(message.split())
    found = _WRONG.fullmatch(line)
    if not found:
        return line
    key, kind, choices, value = found.groups()
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
    wanted = words.get(kind, kind) if kind else "one of " + choices.replace("'", "")
    return f"{key} must be {wanted}; got {value}"


class Parser(ArgumentParser):
    """An argument parser whose errors are one line: what was wrong, and how to see what is expected."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", HelpFormatter)
        if "prog" in kwargs:  # of a command; jsonargparse makes parsers of parts too
            kwargs.setdefault("version", version())
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(f"{_plainly(str(message))} (see: {self.prog} --help)", 2)


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _without_folder() -> bool:
    """Whether this process's working folder has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and turn what it returns or raises into an exit code.

    ValueError, TypeError, RuntimeError, MemoryError and OSError are taken to speak to the user: one line, exit code 2,
    or 1 where the input was right and something else failed (Failed, a full disk).
    Set GDPO_TRACEBACK=1 to see where they came from.
    """

    early.open_streams()
    loaded_early = signal.getsignal(signal.SIGINT) is early.leave
    if loaded_early:
        signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Terminated:
        fail("terminated", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left (| head): not an error
        code = 0
    except (ValueError, TypeError, RuntimeError, MemoryError, OSError, ImportError) as error:
        if os.environ.get("GDPO_TRACEBACK"):
            raise
        text = (
            early.why_not_imported(error)
            if isinstance(error, ModuleNotFoundError)
            else str(error) or type(error).__name__
        )
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror}"
        elif isinstance(error, FileNotFoundError) and _without_folder():
            text = "the working folder is gone; change to one that is there"
        disk = isinstance(error, OSError) and error.errno in _DISK
        fail(" ".join(text.split()), 1 if disk or isinstance(error, Failed) else 2)
    finally:
        if loaded_early:
            early.leave_on_signals()  # the interpreter ends; an interrupt now would print a traceback
    sys.exit(code)
