"""Let ``python -m mambakit`` do what the ``mambakit`` command does."""

import sys

from mambakit.cli import main

if __name__ == "__main__":
    sys.exit(main())
