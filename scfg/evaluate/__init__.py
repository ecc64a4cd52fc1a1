"""What guidance does to the embedded model, measured against what is known of its scenes."""
