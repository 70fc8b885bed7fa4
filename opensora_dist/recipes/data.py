"""The order of a run's data, from its config; and what is said of it before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import Order, build_order
from opensora_dist.models.base import VideoTransformer
from opensora_dist.parallel.keys import Keys


def order_of(data: DataConfig, index: Index, model: VideoTransformer, *, keys: Keys) -> Order:
    """The order that a config asks for, with what this model makes of a sample: its tokens and its FLOPs.

    Raises:
        ConfigError: The model's patch doesn't divide latents.
        DataError: Nothing can be trained on.
    """

    def tokens_of(latent: Thw) -> int:
        return model.token_grid(latent).volume

    def cost_of(latent: Thw, text_tokens: int) -> float:
        return model.flops(latent, text_tokens=text_tokens)

    return build_order(index, data, keys=keys, tokens_of=tokens_of, cost_of=cost_of)


def tokens_per_unit(data: DataConfig, order: Order, index: Index, model: VideoTransformer) -> float:
    """Of the units of an epoch, on average."""
    tokens = sum(
        model.token_grid(index.latent_of(y.bucket)).volume * y.used_per_epoch for y in order.yields() if y.used_per_epoch
    )
    return tokens / (order.batches_per_epoch * data.global_batch)


def budget_tokens(data: DataConfig) -> int | None:
    """Tokens that the units of a step may have; None where units are single samples."""
    return None if data.unit_tokens is None else data.global_batch * data.unit_tokens


def largest_unit(config: TrainConfig, order: Order, model: VideoTransformer) -> tuple[Thw, int]:
    """The latent shape and the number of samples of the unit that takes most memory: of packs, one full of the largest samples."""
    latent = max(order.latents, key=lambda latent: (model.token_grid(latent).volume, latent))
    tokens = model.token_grid(latent).volume
    return latent, max(1, (config.data.unit_tokens or 0) // tokens)


def said_of_order(data: DataConfig, order: Order, index: Index, model: VideoTransformer) -> Iterator[str]:
    """For the reader of a log: what each bucket yields, and what a unit holds."""
    for y in order.yields():
        left = f"; {y.planned - y.used_per_epoch:,} left out ({y.reason})" if y.reason else ""
        used = f"{y.used_per_epoch:,} in {y.steps_per_epoch:,} steps an epoch" if y.used_per_epoch else "none used"
        yield f"bucket {y.bucket}: {y.samples:,} samples, {used}{left}"
    average = tokens_per_unit(data, order, index, model)
    steps = f"{order.batches_per_epoch:,} steps an epoch, each of {data.global_batch:,}"
    if data.unit_tokens is None:
        yield f"{steps} samples of one shape, {average:,.0f} tokens each on average"
        return
    what = "packs" if data.batching == "packed" else "batches of one shape"
    filled = f"{average:,.0f} of at most {data.unit_tokens:,} tokens each on average ({average / data.unit_tokens:.1%})"
    quality = order.packing
    spread = "" if quality is None else f"; the costliest of a step costs {quality.imbalance:.1%} more than their mean"
    yield f"{steps} {what}, {filled}{spread}"
