"""Measuring what guidance does to the embedded model, against what is known of its scenes."""
