"""`python -m paramshare` is the `paramshare` command."""

import sys

from paramshare.cli import main

sys.exit(main())
