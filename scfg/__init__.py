"""Semantic-aware classifier-free guidance for diffusion U-Nets."""

__version__ = "0.1.0"
