"""Replaced: see `tf_lesion.cli.replaced`."""

import sys

from tf_lesion.cli.replaced import main

if __name__ == "__main__":
    sys.exit(main("eval.compare_postprocessing"))
