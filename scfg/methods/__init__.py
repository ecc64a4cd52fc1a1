"""Other guidance: to compare S-CFG with, and to multiply with its rate."""
