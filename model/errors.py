"""Errors that a user can mend, and the one way in which every script ends because of them."""

import argparse
import errno
import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad data, files or weights: one sentence that says what is wrong, where, and what to do."""


class UsageError(InputError):
    """Flags that cannot go together: reported like an argparse error, exit code 2."""


def check_given_text(text: str, flag: str) -> None:
    """Raise UsageError for half a character: bytes of a command line that are not in the console's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} is no Unicode text (see its character {error.start + 1}): type it again") from None


def loosen_console() -> None:
    """Let a console that lacks a character (GBK has no emoji) show its code instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook or a test stands in for it
            stream.reconfigure(errors="backslashreplace")


def run_script(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run main(parse_args()); end with one sentence and exit 1 (data, files), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM).

    Programming errors keep their traceback; --debug keeps it for every error.
    """
    loosen_console()
    args = parse_args()
    try:
        main(args)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    except (InputError, OSError) as error:
        if getattr(args, "debug", False):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def describe(error: Exception) -> str:
    """One sentence for an InputError or an OSError, with the file that it is about."""
    if not isinstance(error, OSError):
        return str(error)
    advice = {
        errno.ENOSPC: "the disk is full: free some space or choose another --out_dir",
        errno.EACCES: "permission denied: choose another place or change its permissions",
        errno.EROFS: "read-only file system: choose another --out_dir",
        errno.ENOENT: "no such file or folder",
    }.get(error.errno, error.strerror or str(error))
    return f"{error.filename}: {advice}" if error.filename else advice
