"""Tensor parallelism: ranks that share the linears of a block, each with some heads and some hidden units. Names no model."""
