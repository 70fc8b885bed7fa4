"""Checkpoints that are committed or don't exist: tensors as safetensors, a manifest of hashes, an atomic publish."""
