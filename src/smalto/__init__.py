"""smalto: an experiment platform for autoregressive image generation."""

__version__ = "0.1.0"
