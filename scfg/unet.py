"""`scfg.models.unet` by its short name."""

import sys

from scfg.models import unet

sys.modules[__name__] = unet  # as os.path is
