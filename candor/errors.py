"""Errors a person can cause, told as what was found, where, and what to do; without a traceback.

Our own broken invariants stay ordinary exceptions with a traceback: they are bugs, and the
traceback is what mends them.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """Something in a file, a path or a command line is wrong and a person can mend it."""

    status = 2  # that a script ends with


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to ``word``, or the known words when none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"


def told(error: OSError) -> str | None:
    """A failed system call in words for a person; None when it is none of a file's or disk's making."""
    if error.errno is None:
        return None
    where = error.filename or "the output"
    return f"{where}: {os.strerror(error.errno)}. Check the path, the free space and the rights."


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a script's ``main`` on the command line; a UserError becomes one message and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.status)
    except OSError as error:
        message = told(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue where it stopped\n")
        sys.exit(130)
    sys.exit(0)
