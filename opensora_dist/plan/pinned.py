"""What a rank takes of CPU memory: torch's allocator of pinned memory gives out powers of two, unless it is told otherwise."""

from __future__ import annotations

from opensora_dist.plan.memory import MemoryCase, estimate, kept_of_block, tokens_of_rank


def pinned_bytes(case: MemoryCase) -> int:
    """Of a rank, with what is lost to rounding: of offloaded activations that are all computed again, storage by storage; else at most.

    Source: ``torch.cuda.memory.host_memory_stats``, "block sizes are rounded up to the next power of two".
    """
    blocks = case.model.shape.depth - 1 if case.parallel.offload_activations else 0
    states = estimate(case).host - int(blocks * kept_of_block(case))
    return 2 * states + blocks * _pinned_of_block(case)


def _pinned_of_block(case: MemoryCase) -> int:
    sp, stream = case.parallel.sp, tokens_of_rank(case) * case.model.shape.width
    c, r = {"bfloat16": (2, 4), "float32": (4, 4), "float64": (8, 8)}[case.dtype]
    if case.parallel.recompute != "full" or (sp.degree > 1 and sp.scheme != "dsp"):
        return 2 * int(kept_of_block(case))
    # The residual; and what dsp received, twice, in so many pieces.
    arrived = stream * c * (sp.degree - 1) // sp.degree // sp.chunks
    return _power_of_two(stream * r) + 2 * sp.chunks * _power_of_two(arrived)


def _power_of_two(num_bytes: int) -> int:
    """The least that holds them."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
