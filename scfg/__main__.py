"""``python -m scfg``: the command line."""

import sys

from scfg.cli import main

sys.exit(main())
