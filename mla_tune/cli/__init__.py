"""The ``mla-tune`` command: thin commands over the library; what they need is imported when they run."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mla_tune.errors import MlaTuneError


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt_once)
    sys.exit(run(sys.argv[1:]))


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Stop at the first Ctrl-C, and let no further one cut short what stopping does: end the worker, close the files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code.

    0; 2 for a wrong argument, 3 for a goal that a policy missed, 130 for Ctrl-C, 1 for all else. Whatever goes
    wrong ends as one line on standard error.
    """
    try:
        from mla_tune.cli.app import invoke

        code = invoke(arguments)
        if sys.stdout is not None:  # None: started with it closed
            sys.stdout.flush()  # here, so that a reader that has gone or a full disk is met inside this try
        return code
    except MlaTuneError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _fail(f"this command needs {error.name}, which is not installed: pip install 'mla-tune[tune]'", 1)
    except KeyboardInterrupt:
        return _fail("interrupted: what was measured is stored; run the same command again to go on", 130)
    except BrokenPipeError:  # the reader of our output has gone, as with `mla-tune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)


def _fail(line: str, code: int) -> int:
    shown = " ".join(line.split()).encode(errors="backslashreplace").decode()
    print(f"mla-tune: {shown}", file=sys.stderr)
    return code
