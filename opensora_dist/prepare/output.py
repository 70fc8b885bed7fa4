"""From kept clips to shards and an index: which shard holds what, and how one data set takes another's place.

A shard holds one bucket's clips in the order of the sources, and its name ends with a hash of what it holds. So a shard that is still
right is left alone, new ones never overwrite those that a reader may be reading, and the index, written behind all of its shards, changes
from the old set to the new one at once. Only then the old shards go.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.index import write_index
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.prepare.batches import batched
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.resume import FORMAT, Finished, remove_finished, write_finished
from opensora_dist.prepare.shards import Sample, ShardWriter
from opensora_dist.prepare.stats import ChannelSums, measured_stats
from opensora_dist.prepare.store import StageStore, address

_HASH_DIGITS = 12
_NAME = re.compile(rf"\d+x\d+x\d+-\d{{6,}}-[0-9a-f]{{{_HASH_DIGITS}}}\.tar")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A clip that becomes a sample.

    Args:
        key, source, caption, shape: Of the sample.
        video: Name of the file of its video, where one is saved.
        latents, text: Keys of its arrays.
    """

    key: str
    source: str
    caption: str
    shape: Thw
    video: str
    latents: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What a shard is to hold."""

    name: str
    kept: tuple[Kept, ...]


class LostArraysError(Exception):
    """Arrays that were recorded can't be read, and are forgotten: they are to be encoded again."""


def plan_shards(kept: Iterable[Kept], config: PrepareConfig) -> list[ShardPlan]:
    """The shards of a data set, bucket by bucket, each bucket in the order given."""
    by_shape: dict[Thw, list[Kept]] = defaultdict(list)
    for one in kept:
        by_shape[one.shape].append(one)
    plans = []
    for shape in sorted(by_shape):
        for number, batch in enumerate(batched(by_shape[shape], config.output.shard_samples)):
            about = [[one.key, one.source, one.caption, one.latents, one.text] for one in batch]
            digest = address("shard", FORMAT, config.clip.fps, about)[:_HASH_DIGITS]
            plans.append(ShardPlan(name=f"{shape}-{number:06d}-{digest}.tar", kept=batch))
    return plans


def write_shards(
    plans: Sequence[ShardPlan],
    *,
    folder: Path,
    config: PrepareConfig,
    finished: dict[str, Finished],
    store: StageStore,
    blobs: Blobs,
    on_shard: Callable[[int], None],
) -> None:
    """Writes the shards that aren't there, and lets go of what they hold.

    Args:
        finished: Shards that are there; those written are added.
        on_shard: Called with the number of shards that are there, after each.
    Raises:
        LostArraysError: What some clips were encoded to is gone.
    """
    lost = 0
    for number, plan in enumerate(plans, start=1):
        if plan.name not in finished:
            samples = [_sample(one, store=store, blobs=blobs, fps=config.clip.fps) for one in plan.kept]
            lost += samples.count(None)
            if None not in samples:
                finished[plan.name] = _write_shard(folder, plan, [s for s in samples if s is not None])
                blobs.now_in_shard(finished[plan.name].places(folder))
        on_shard(number)
    if lost:
        raise LostArraysError(f"{lost} clips have lost what they were encoded to")


def publish(
    plans: Sequence[ShardPlan],
    *,
    folder: Path,
    finished: dict[str, Finished],
    spec: DatasetSpec,
    blobs: Blobs,
    wanted: frozenset[str],
) -> None:
    """Writes the index of these shards, then removes all others.

    Args:
        wanted: Keys of the arrays of all clips, kept or not. What only an old shard holds of them is put aside first: a threshold that is
            set back encodes nothing again. What is put aside of anything else goes.
    """
    records = [finished[plan.name] for plan in plans]
    rows = (row for record in records for row in record.rows)
    write_index(folder, rows=rows, shards=[record.shard for record in records], spec=spec.model_dump(mode="json"))
    held = {key for record in records for pair in record.arrays for key in pair}
    planned = {plan.name for plan in plans}
    for name in [name for name in finished if name not in planned]:
        for key in {key for pair in finished[name].arrays for key in pair} & wanted - held:
            blobs.put_aside(key)
        remove_finished(folder, name)
        del finished[name]
    for stray in folder.glob("*.tar"):
        if _NAME.fullmatch(stray.name) and stray.name not in planned:  # one that was cut short, or whose record was lost
            stray.unlink()
    blobs.discard(blobs.files() - (wanted - held))


def dataset_spec(
    plans: Sequence[ShardPlan], *, config: PrepareConfig, finished: dict[str, Finished], codec: VideoCodec, text: TextEncoder
) -> DatasetSpec:
    """What the data set is made of, latent statistics measured where the codec has none of its own."""
    counts: dict[Thw, int] = defaultdict(int)
    for plan in plans:
        counts[plan.kept[0].shape] += len(plan.kept)
    stats = codec.stats or measured_stats(ChannelSums.add(finished[plan.name].sums for plan in plans))
    return DatasetSpec(
        codec=config.codec,
        text=config.text,
        channels=codec.channels,
        spatial_factor=codec.spatial_factor,
        temporal_factor=codec.temporal_factor,
        text_width=text.width,
        max_tokens=text.max_tokens,
        latent_mean=stats.mean,
        latent_std=stats.std,
        fps=config.clip.fps,
        buckets=tuple(clip for clip, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )


def _sample(one: Kept, *, store: StageStore, blobs: Blobs, fps: float) -> Sample | None:
    """The sample, or None where one of its arrays is lost: that one is forgotten."""
    arrays = []
    for stage, key in (("latents", one.latents), ("text", one.text)):
        array = blobs.read(key, xxh3=store.get(stage, key)["xxh3"])
        if array is None:
            blobs.forget(key)
            store.put(stage, key, None)
        arrays.append(array)
    latents_tChw, text_YE = arrays
    if latents_tChw is None or text_YE is None:
        return None
    return Sample(
        key=one.key,
        latents_tChw=latents_tChw,
        text_YE=text_YE,
        caption=one.caption,
        source=one.source,
        clip=one.shape,
        fps=fps,
    )


def _write_shard(folder: Path, plan: ShardPlan, samples: Sequence[Sample]) -> Finished:
    """Gives a shard its name, then records it."""
    writer = ShardWriter(folder / plan.name)
    try:
        rows = [writer.add(sample) for sample in samples]
        record = Finished(
            shard=writer.finish(),
            rows=tuple(rows),
            sums=ChannelSums.add(ChannelSums.of(sample.latents_tChw) for sample in samples),
            arrays=tuple((one.latents, one.text) for one in plan.kept),
        )
    finally:
        writer.discard()  # of a shard under way; one that was finished is left alone
    write_finished(folder, record)
    return record
