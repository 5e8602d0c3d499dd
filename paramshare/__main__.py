"""Runs the `paramshare` command: `python -m paramshare`."""

import sys

from paramshare.cli import main

sys.exit(main())
