"""What a time means: samples, tokens, use of the hardware and money. The same for a whole step and for one block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all ranks do together in one step, and on what.

    Args:
        samples: Of the global batch.
        tokens: Of one sample.
        flops: Forward FLOPs of one sample, by the model's formula; backward costs twice as many. Recomputation is not counted.
        world: Ranks.
        peak_flops: Of one rank's device, FLOP/s; None where it isn't known.
        dollars_per_gpu_hour: What a rank's device costs; None where no price is given.
    """

    samples: int
    tokens: int
    flops: int
    world: int
    peak_flops: float | None
    dollars_per_gpu_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one form; None where what it takes is not known.

    Args:
        tokens_per_s_per_rank: Of all samples, over the ranks. A rank is a GPU, where there are GPUs.
        mfu: Model FLOPs over the peak, 0 to 1.
        exposed_share: Of the time, what communication adds to it.
        dollars_per_million_tokens: Of training tokens.
    """

    step_s: float
    samples_per_s: float
    tokens_per_s_per_rank: float
    mfu: float | None
    exposed_share: float | None
    dollars_per_million_tokens: float | None


def speed(step_s: float, *, work: Work, exposed_s: float | None) -> Speed:
    """
    Args:
        step_s: Seconds of a step.
        exposed_s: Of these, what the step takes longer than without communication; None where that isn't known.
    """
    tokens = work.samples * work.tokens
    per_rank = tokens / step_s / work.world
    price = work.dollars_per_gpu_hour
    return Speed(
        step_s=step_s,
        samples_per_s=work.samples / step_s,
        tokens_per_s_per_rank=per_rank,
        mfu=3 * work.flops * work.samples / (step_s * work.peak_flops * work.world) if work.peak_flops else None,
        # Two medians may differ by noise alone: less than nothing is nothing.
        exposed_share=None if exposed_s is None else max(0.0, exposed_s) / step_s,
        dollars_per_million_tokens=None if price is None else dollars_per_million_tokens(per_rank, dollars_per_gpu_hour=price),
    )


def dollars_per_million_tokens(tokens_per_s_per_rank: float, *, dollars_per_gpu_hour: float) -> float:
    """What a million tokens of training cost."""
    return dollars_per_gpu_hour / 3600 / tokens_per_s_per_rank * 1e6
