"""Triton kernels of the training step, each beside its torch reference and registered as an operator that torch sees through.

What a file holds: ``reference`` in plain torch; the operator of the file's name, with a fake and a backward, so that compilation, FSDP and
recomputation treat it as any other; the kernels. Only ``opensora_dist.ops`` imports this package.
"""
