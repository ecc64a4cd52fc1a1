"""From a network while it runs to guided predictions."""

from scfg.recording.wrapper import UNetWrapper, guided

__all__ = ["UNetWrapper", "guided"]
