"""From a network while it runs to guided predictions."""

from scfg.recording.predictor import guided
from scfg.recording.wrapper import Recorder, UNetWrapper

__all__ = ["Recorder", "UNetWrapper", "guided"]
