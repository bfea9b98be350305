"""What a command does before anything heavy is imported.

Imports take up to seconds. Ctrl-C or SIGTERM meanwhile ends the process with one line, as it does later on: there is
nothing to clean up yet. So does an import that fails, for want of an extra's packages or of memory. A standard stream
that is closed becomes the null device, else the next file opened would get its number, and what is printed would end up
in that file.
"""

import os
import signal
import sys
from types import FrameType, TracebackType

CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def prepare_command() -> None:
    """Prepare this process where it is one of the project's commands (`python -m engine.x`, `gdpo-x`), else nothing.

    Called while the package is imported. Then `python -m` has set sys.argv[0] to "-m".
    """
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m" or name.startswith("gdpo-"):
        open_streams()
        leave_on_signals()
        sys.excepthook = leave_on_import_error


def open_streams() -> None:
    """Open the null device in place of standard streams that are closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 (for the process's life)


def leave_on_signals() -> None:
    """From now on Ctrl-C and SIGTERM end the process at once. A signal that the parent had ignored stays ignored."""
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def leave_on_import_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line in place of a traceback, as engine.io.cli.run does it later on."""
    if os.environ.get("GDPO_TRACEBACK") or not isinstance(error, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, trace)
    os.write(2, f"error: {why_not_imported(error)}\n".encode(errors="replace"))
    os._exit(2)


def why_not_imported(error: BaseException) -> str:
    """What to say of an error that an import has met."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"this command needs {package}, which is not installed; pip install 'gdpo-sr[train,export]'"
    return f"what this command needs could not be loaded: {' '.join(str(error).split()) or type(error).__name__}"


def leave(number: int, frame: FrameType | None) -> None:
    """End the process: one line, the signal's exit code, no clean-up."""
    code, word = CODES[signal.Signals(number)]
    os.write(2, f"error: {word}\n".encode())
    os._exit(code)
