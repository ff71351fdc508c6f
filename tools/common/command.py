"""The end of a command: its exit code, and one line about what went wrong."""

import sys
from collections.abc import Callable

from decorr_fx import DecorrError
from tools.common.errors import UsageError

INTERRUPTED = 130  # what a shell reports after Ctrl-C
WRONG = 2  # as argparse has it


def exit_code(tool: str, perform: Callable[[], int | None], interrupted: str = "") -> int:
    """Return what `perform` returns, 0 for None; WRONG for an error that is told in a line; INTERRUPTED after Ctrl-C.

    Args:
        tool: name after `python -m tools.`.
        perform: the whole command.
        interrupted: what is told after Ctrl-C.
    """
    try:
        return perform() or 0
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    except (UsageError, DecorrError, OSError) as error:
        print(f"python -m tools.{tool}: error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(interrupted, end="\n" if interrupted else "", file=sys.stderr)
        return INTERRUPTED
