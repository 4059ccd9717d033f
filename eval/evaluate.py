"""`tf-lesion evaluate` from a checkout."""

from tf_lesion.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
