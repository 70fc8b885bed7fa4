"""Frozen networks between pixels, words and the diffusion model: video codecs and text encoders, behind ``core.protocols``."""
