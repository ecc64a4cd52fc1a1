"""From a network while it runs to guided predictions."""

from scfg.recording.predictor import guided
from scfg.recording.wrapper import UNetWrapper

__all__ = ["UNetWrapper", "guided"]
