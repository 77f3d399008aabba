"""Entry of `python -m fastjepa.cli`."""

import sys

from fastjepa.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
