"""python -m hrbp: training sparse networks, and masks of trained weights. Every command has --help."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
