"""Distributed training of Sora-style video diffusion transformers."""

__version__ = "0.1.0"
