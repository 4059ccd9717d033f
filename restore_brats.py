"""Restore patients' slices towards the healthy prior; see `tf_lesion.cli.restore`."""

import sys

from tf_lesion.cli.restore import main

if __name__ == "__main__":
    sys.exit(main())
