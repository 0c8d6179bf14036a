"""``python -m k8scifar``: the same as the console script ``k8scifar``."""

from k8scifar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
