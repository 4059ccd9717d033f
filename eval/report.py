"""`tf-lesion report` from a checkout."""

from tf_lesion.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
