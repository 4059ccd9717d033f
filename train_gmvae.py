"""Train a GMVAE, or another method of Table 1; see `tf_lesion.cli.train`."""

import sys

from tf_lesion.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
