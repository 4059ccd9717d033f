"""What every command shares: errors as one line, help that keeps its line breaks."""

import argparse
import functools
import sys

from tf_lesion.files import InputError

EXIT_BAD_INPUT = 2
HDF5_WRITE_FAILED = "write failed"


def command(main):
    """Decorate `main(argv)`: bad input and full disks become one line and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv) or 0
        except (InputError, OSError) as error:
            message = str(error)
        except RuntimeError as error:  # how h5py reports a disk that filled up
            if HDF5_WRITE_FAILED not in str(error):
                raise
            message = f"cannot write, is the disk full? ({error})"
        print(f"error: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT

    return wrapped


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the example and shows the defaults that say something."""

    def _get_help_string(self, action):
        told = "default" in (action.help or "")
        if told or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)
