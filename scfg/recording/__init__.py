"""From a network while it runs to guided predictions."""

from scfg.recording.network import Recorder, UNetWrapper
from scfg.recording.wrapper import guided

__all__ = ["Recorder", "UNetWrapper", "guided"]
