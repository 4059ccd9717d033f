"""What every command shares: errors as one line that names the options."""

import argparse
import functools
import io
import os
import re
import sys
from collections.abc import Callable

from tf_lesion.cli.options import OPTIONS, HelpFormatter
from tf_lesion.files import InputError

__all__ = ["EXIT_BAD_INPUT", "EXIT_INTERRUPTED", "HelpFormatter", "check_effect", "command"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C
HDF5_WRITE_FAILED = "write failed"


def command(main: Callable) -> Callable:
    """Decorate `main(argv)`: bad input and full disks become one line and exit status 2.

    Ctrl-C becomes a line as well, and exit status 130.

    The user's surroundings break nothing: pictures need no screen, whatever MPLBACKEND a notebook
    has left, and what the screen's encoding lacks is written with a backslash.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        os.environ["MPLBACKEND"] = "Agg"
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv) or 0
        except (InputError, OSError) as error:
            message = str(error)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return EXIT_INTERRUPTED
        except RuntimeError as error:  # how h5py reports a disk that filled up
            if HDF5_WRITE_FAILED not in str(error):
                raise
            message = f"cannot write, is the disk full? ({error})"
        print(f"error: {message}{_options_in(message)}", file=sys.stderr)
        return EXIT_BAD_INPUT

    return wrapped


def check_effect(
    parser: argparse.ArgumentParser, options: argparse.Namespace, needs: dict[str, tuple]
) -> None:
    """Raise `InputError` for an option that would have no effect.

    Args:
        parser: knows the defaults.
        options: as parsed.
        needs: {option: (what gives it a meaning, whether that is there)}.
    """
    for name, (wanted, there) in needs.items():
        kept = name.removeprefix("--").replace("-", "_")
        if not there and getattr(options, kept) != parser.get_default(kept):
            raise InputError(f"Expected {name} only with {wanted}: it has no effect, leave it out.")


def _options_in(message):
    """The options of a message of the library about its arguments: " (--tv-weight)"."""
    words = re.findall(r"(?<![\w/.-])[a-z]+(?:_[a-z]+)+(?![\w/-]|\.\w)", message)
    named = (f"--{word.replace('_', '-')}" for word in dict.fromkeys(words))
    flags = [flag for flag in named if flag in OPTIONS and flag not in message]
    return f" ({', '.join(flags)})" if flags else ""
