"""The order of a run's data, from its config; and what is said of it before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import ceil

from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.errors import CommunicationError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import Order, build_order
from opensora_dist.models.base import VideoTransformer
from opensora_dist.parallel.gather import gather_text
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.plan.memory import MemoryCase

_LOOKED_AT = 8  # steps


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


def same_order_everywhere(config: TrainConfig, index: Index, order: Order, mesh: Mesh) -> None:
    """Makes sure that every rank is about to train on the same data in the same order. Collective over all ranks.

    Ranks that share samples compare what they hold before each forward. Ranks with samples of their own never see each other's: if
    their folders differed, the weights would be trained on neither order, in silence.

    Raises:
        CommunicationError: On every rank alike, with what differs and the values of each.
    """
    data = config.data
    rules = [data.batching, data.global_batch, data.unit_tokens, data.image_share, data.shuffle_shards, data.loss_weight]
    mine = {
        "data set": index.dataset_hash,
        "run.seed": str(config.run.seed),
        "rules of the order in data": " ".join(map(str, rules)),
        "weights of data.mixture": " ".join(str(entry.weight) for entry in data.mixture),
        "first batch": order.batch(0).digest,
    }
    told = [json.loads(text) for text in gather_text(json.dumps(mine), group=mesh.control)]
    problems = []
    for name in mine:
        ranks: dict[str, list[int]] = {}
        for rank, values in enumerate(told):
            ranks.setdefault(values[name], []).append(rank)
        if len(ranks) > 1:
            problems.append(f"{name}: " + ", ".join(f"ranks {some} -> {value}" for value, some in ranks.items()))
    if problems:
        raise CommunicationError(
            f"ranks are about to train on different data, or in another order: {'; '.join(problems)}; every machine must read the same "
            "data set with the same config: copy the folder again from one of them to the others, or give a path that all share"
        )


def tokens_per_unit(data: DataConfig, order: Order, index: Index, model: VideoTransformer) -> float:
    """Of the units of an epoch, on average."""
    tokens = sum(
        model.token_grid(index.latent_of(y.bucket)).volume * y.used_per_epoch for y in order.yields() if y.used_per_epoch
    )
    return tokens / (order.batches_per_epoch * data.global_batch)


def budget_tokens(data: DataConfig) -> int | None:
    """Tokens that the units of a step may have; None where units are single samples."""
    return None if data.unit_tokens is None else data.global_batch * data.unit_tokens


def memory_case(config: TrainConfig, order: Order, index: Index, model: VideoTransformer, *, world: int) -> MemoryCase:
    """The micro-batch of a run that takes most memory, for ``plan.memory``: of packs one that is full."""
    parallel, data, spec = config.parallel, config.data, index.spec
    units = data.global_batch * parallel.sp.degree * parallel.tp // (world * parallel.grad_accum)
    tokens = {latent: model.token_grid(latent).volume for latent in order.latents}
    filled = {latent: units * max(1, (data.unit_tokens or 0) // tokens[latent]) for latent in tokens}
    latent = max(tokens, key=lambda latent: (filled[latent] * tokens[latent], latent))
    micro_batch, samples = filled[latent], 0
    if data.batching == "packed":
        latent = max(tokens, key=lambda latent: (tokens[latent], latent))
        micro_batch = ceil(units * (data.unit_tokens or 0) / tokens[latent])
        samples = units * max(len(unit) for step in range(_LOOKED_AT) for unit in order.batch(step).units)
    return MemoryCase(
        model=config.model,
        parallel=parallel,
        world=world,
        latent=latent,
        dtype=config.run.dtype,
        micro_batch=micro_batch,
        packed_samples=samples,
        channels=spec.channels,
        text_width=spec.text_width,
        text_tokens=max(order.batch(step).text_tokens for step in range(_LOOKED_AT)),
        max_tokens=spec.max_tokens,
    )


def said_of_order(data: DataConfig, order: Order, index: Index, model: VideoTransformer) -> Iterator[str]:
    """For the reader of a log: what each bucket yields, and what a unit holds."""
    for y in order.yields():
        left = f"; {y.left_out:,} left out ({y.reason})" if y.reason else ""
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
    if quality is not None and quality.warning:
        yield quality.warning
