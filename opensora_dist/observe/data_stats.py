"""What is told about a data set: plain values, for the terminal, for JSON and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS = 24


@dataclass(frozen=True, kw_only=True)
class BucketStats:
    """Samples of one clip shape.

    Args:
        bucket: Frames x height x width in pixels.
        seconds: Length of each clip.
        latent: Frames x height x width of the latents.
        text_tokens: Mean number of a caption's tokens.
        model_tokens: What the model of a training config makes of one sample; None without a config.
    """

    bucket: str
    samples: int
    seconds: float
    latent: str
    text_tokens: float
    model_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How many clips have which value.

    Args:
        edges: Of the bins, one more than there are bins.
        kept, dropped: Counts, bin by bin.
        unknown: Clips of which the value isn't known.
    """

    name: str
    unit: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    lowest: float
    median: float
    highest: float
    unknown: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        kept: Sequence[float] | NDArray[Any],
        dropped: Sequence[float] | NDArray[Any] = (),
        *,
        unit: str = "",
        unknown: int = 0,
    ) -> Distribution:
        """Of at least one value; bins of whole numbers are whole, too."""
        values = np.concatenate([np.asarray(kept, dtype=np.float64), np.asarray(dropped, dtype=np.float64)])
        low, high = float(values.min()), float(values.max())
        if np.all(values == np.round(values)):
            step = max(1.0, np.ceil((high - low + 1) / _BINS))
            edges = low - 0.5 + step * np.arange(int((high - low) // step) + 2)
        else:
            edges = np.linspace(low, high, _BINS + 1)
        counts = [np.histogram(part, bins=edges)[0].tolist() for part in (kept, dropped)]
        return cls(
            name=name,
            unit=unit,
            edges=tuple(edges.tolist()),
            kept=tuple(counts[0]),
            dropped=tuple(counts[1]),
            lowest=low,
            median=float(np.median(values)),
            highest=high,
            unknown=unknown,
        )


@dataclass(frozen=True, kw_only=True)
class DropReason:
    """Clips that were left out for one reason.

    Args:
        stage: Of the preparation; "" where that isn't known.
        reason: That of the first clip.
        examples: Some of the clips.
        varies: Numbers or names in it differ from clip to clip.
    """

    stage: str
    reason: str
    count: int
    examples: tuple[str, ...]
    varies: bool = False

    @property
    def said(self) -> str:
        """For all of them."""
        return f"{self.reason}, and alike" if self.varies else self.reason


@dataclass(frozen=True, kw_only=True)
class BucketTraining:
    """What a training makes of one bucket in an epoch.

    Args:
        steps: Optimizer steps that have samples of it.
        reason: Why samples are left out; "" where none are.
    """

    bucket: str
    samples: int
    used: int
    steps: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrainingStats:
    """What a training config yields of a data set.

    Args:
        batch: In words.
        steps_per_epoch: Optimizer steps.
        left_out: Bucket and reason to samples that an epoch leaves out.
        efficiency: Share of the budget of tokens that is used; None where there is no budget.
        imbalance: How much more than the mean the costliest pack of a step costs; None where there are none.
        problem: Why it can't train at all.
    """

    config: str
    batch: str
    steps_per_epoch: int
    buckets: tuple[BucketTraining, ...]
    left_out: Mapping[str, int]
    efficiency: float | None = None
    imbalance: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """A data set.

    Args:
        duration_s: All clips, one after the other.
        spec: Codec, text encoder and so on, as JSON values.
        looked_at: Clips that the preparation looked at; None where it left no record.
        empty_captions: Samples that say nothing.
    """

    path: str
    dataset_hash: str
    samples: int
    shards: int
    num_bytes: int
    duration_s: float
    spec: Mapping[str, Any]
    buckets: tuple[BucketStats, ...]
    distributions: tuple[Distribution, ...]
    empty_captions: int
    looked_at: int | None
    drops: tuple[DropReason, ...]
    scores: tuple[Distribution, ...]
    classes: Mapping[str, Mapping[str, int]]
    training: TrainingStats | None = None
