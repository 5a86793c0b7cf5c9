"""``python -m tilefuse <command>``: the commands are the modules of ``tilefuse.cli``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
