"""`python -m knarr` is the `knarr` command."""

import sys

from knarr.cli import main

sys.exit(main())
