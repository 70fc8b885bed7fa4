"""``data stats``: what is in a data set, what the preparation left out and why, and what a training config makes of it before it is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opensora_dist.config.load import load_config
from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import INDEX_NAME
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.mixture import open_data
from opensora_dist.data.order import Order, build_order
from opensora_dist.models.base import VideoTransformer
from opensora_dist.observe.data_stats import BucketStats, BucketTraining, DataStats, Distribution, DropReason, TrainingStats
from opensora_dist.observe.progress import format_count
from opensora_dist.observe.stats_page import write_stats_page
from opensora_dist.parallel.keys import Keys
from opensora_dist.prepare.report import CLIPS_NAME, group_reason
from opensora_dist.recipes.build import meta_model
from opensora_dist.recipes.data_pictures import dropped_pictures, sample_pictures

_EXAMPLES = 4
_SCORES = {  # column of clips.parquet to name and unit
    "aes": ("Aesthetic score", ""),
    "flow": ("Motion", "pixels per frame at 256 pixels height"),
    "match": ("Caption match", "cosine"),
    "brightness": ("Brightness", "mean grey, 0 to 255"),
    "static": ("Static", "share of frames equal to the one before"),
    "sharpness": ("Sharpness", "variance of the Laplacian"),
    "text_area": ("Text on screen", "share of the picture"),
    "compression": ("Compression", "bits per pixel of the source"),
    "height": ("Height of the video", "pixels"),
}
_CLASSES = {"cmotion": "Camera motion"}


def data_stats(path: str | None, *, config: Path | None = None, overrides: Sequence[str] = ()) -> tuple[DataStats, Index | None]:
    """All that can be said of a data set without reading its shards.

    Args:
        path: A prepared folder, or as data.path; default: the data of the config.
        config: A training config: then it is said what it makes of the data.
    Returns:
        What there is to say, and the index it is about: none where a preparation left out everything, so that there is no data set.
    Raises:
        ConfigError: The config, or neither path nor config.
        DataError: There is no index, or it contradicts itself.
    """
    train = TrainConfig() if config is None else load_config(TrainConfig, config, overrides=overrides)
    data = train.data if path is None else train.data.model_copy(update={"path": path, "mixture": ()})
    if data.path is None and not data.mixture:
        raise ConfigError("neither PATH nor a --config with data.path or data.mixture; give the folder of a prepared data set")
    if path is not None and (Path(path) / CLIPS_NAME).is_file() and not (Path(path) / INDEX_NAME).is_file():
        return _nothing_kept(Path(path)), None
    index = open_data(data, max_lost=1 << 62)  # what is missing of shards is `data check`'s to say
    model = None if config is None else meta_model(train.model, train.objective, index.spec)[0]
    clips = _clips([one.folder for one in index.sets])
    stats = DataStats(
        path=path or index.where,
        dataset_hash=index.dataset_hash,
        samples=len(index),
        shards=len(index.shards),
        num_bytes=sum(shard.num_bytes for shard in index.shards),
        duration_s=sum(len(rows) * bucket.t / index.spec.fps for bucket, rows in index.buckets.items() if bucket.t > 1),
        spec=index.spec.model_dump(mode="json", exclude={"buckets"}),
        buckets=tuple(_bucket(index, bucket, model) for bucket in sorted(index.buckets, key=lambda b: -len(index.buckets[b]))),
        distributions=(
            Distribution.of("Text tokens", index.text_tokens, unit="per caption"),
            Distribution.of("Caption length", [len(caption.split()) for caption in index.captions], unit="words"),
        ),
        empty_captions=sum(not caption.strip() for caption in index.captions),
        looked_at=None if clips is None else len(clips),
        drops=() if clips is None else _drops(clips),
        scores=() if clips is None else _scores(clips),
        classes={} if clips is None else _classes(clips),
    )
    if model is not None:
        shown = " ".join([str(config), *overrides])
        stats = replace(stats, training=_training(index, model, data, seed=train.run.seed, config=shown))
    return stats, index


def _bucket(index: Index, bucket: Thw, model: VideoTransformer | None) -> BucketStats:
    rows, latent = index.buckets[bucket], index.latent_of(bucket)
    try:
        tokens = None if model is None else model.token_grid(latent).volume
    except ConfigError:  # said of the training as a whole
        tokens = None
    return BucketStats(
        bucket=str(bucket),
        samples=len(rows),
        seconds=bucket.t / index.spec.fps if bucket.t > 1 else 0.0,
        latent=str(latent),
        text_tokens=float(index.text_tokens[rows].mean()),
        model_tokens=tokens,
    )


def _training(index: Index, model: VideoTransformer, data: DataConfig, *, seed: int, config: str) -> TrainingStats:
    """What becomes of the samples, as training itself would plan it."""
    unit = f" of at most {data.unit_tokens:,} tokens" if data.unit_tokens else ""
    batch = {
        "samples": f"{data.global_batch} samples of one shape a step",
        "tokens": f"{data.global_batch} batches{unit}, of one shape, a step",
        "packed": f"{data.global_batch} packs{unit} a step",
    }[data.batching]

    def cost_of(latent: Thw, text_tokens: int) -> int:
        return model.flops(latent, text_tokens=text_tokens)

    try:
        order = build_order(
            index, data, keys=Keys(seed), tokens_of=lambda latent: model.token_grid(latent).volume, cost_of=cost_of
        )
    except (ConfigError, DataError) as error:
        problem = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
        nothing = tuple(
            BucketTraining(bucket=str(bucket), samples=len(rows), used=0, steps=0, reason="see above")
            for bucket, rows in sorted(index.buckets.items(), key=lambda item: -len(item[1]))
        )
        return TrainingStats(config=config, batch=batch, steps_per_epoch=0, buckets=nothing, left_out={}, problem=problem)
    quality = order.packing
    return TrainingStats(
        config=config,
        batch=batch,
        steps_per_epoch=order.batches_per_epoch,
        buckets=tuple(
            BucketTraining(
                bucket=str(y.bucket), samples=y.samples, used=y.used_per_epoch, steps=y.steps_per_epoch, reason=y.reason
            )
            for y in sorted(order.yields(), key=lambda y: -y.samples)
        ),
        left_out=dict(order.dropped),
        efficiency=_fill(order, index, data, model) if quality is None else quality.fill,
        imbalance=None if quality is None else quality.imbalance,
    )


def _fill(order: Order, index: Index, data: DataConfig, model: VideoTransformer) -> float | None:
    """Of rectangular batches by tokens, how much of the budget they use on average."""
    if data.batching != "tokens" or data.unit_tokens is None:
        return None
    used = [(y.steps_per_epoch, model.token_grid(index.latent_of(y.bucket)).volume * y.used_per_epoch) for y in order.yields()]
    return sum(tokens for _, tokens in used) / (sum(steps for steps, _ in used) * data.global_batch * data.unit_tokens)


def _nothing_kept(folder: Path) -> DataStats:
    """Of a preparation without a sample: why, and the scores that thresholds are to be chosen from."""
    clips = _clips([folder])
    assert clips is not None
    return DataStats(
        path=str(folder),
        dataset_hash="",
        samples=0,
        shards=0,
        num_bytes=0,
        duration_s=0.0,
        spec={},
        buckets=(),
        distributions=(),
        empty_captions=0,
        looked_at=len(clips),
        drops=_drops(clips),
        scores=_scores(clips),
        classes=_classes(clips),
    )


def _clips(folders: Sequence[Path]) -> pa.Table | None:
    """The record of every clip that the preparation looked at, of all the data sets that have one."""
    paths = [folder / CLIPS_NAME for folder in folders]
    columns = ["path", "kept", "stage", "reason", *_SCORES, *_CLASSES]
    tables = [pq.read_table(path, columns=columns) for path in paths if path.is_file()]
    return pa.concat_tables(tables) if tables else None


def _drops(clips: pa.Table) -> tuple[DropReason, ...]:
    """Reasons, the most frequent first."""
    lost = clips.filter(pc.invert(clips.column("kept"))).select(["stage", "reason", "path"]).to_pylist()
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for row in lost:
        reason = row["reason"] or "not finished"
        groups[row["stage"] or "", group_reason(reason)].append((reason, row["path"]))
    found = [
        DropReason(
            stage=stage,
            reason=some[0][0],
            count=len(some),
            examples=tuple(dict.fromkeys(path for _, path in some))[:_EXAMPLES],
            varies=len({reason for reason, _ in some}) > 1,
        )
        for (stage, _), some in groups.items()
    ]
    return tuple(sorted(found, key=lambda drop: -drop.count))


def _scores(clips: pa.Table) -> tuple[Distribution, ...]:
    """Of each score that any clip has."""
    kept = clips.column("kept").to_numpy()
    found = []
    for column, (name, unit) in _SCORES.items():
        values = clips.column(column).to_numpy().astype(np.float64)
        known = np.isfinite(values)
        if known.any():
            unknown = int((~known & kept).sum())
            found.append(Distribution.of(name, values[known & kept], values[known & ~kept], unit=unit, unknown=unknown))
    return tuple(found)


def _classes(clips: pa.Table) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for column, name in _CLASSES.items():
        counts = [(row["values"], row["counts"]) for row in pc.value_counts(clips.column(column)).to_pylist() if row["values"]]
        if counts:
            found[name] = dict(sorted(counts, key=lambda pair: -pair[1]))
    return found


def write_page(path: Path, stats: DataStats, index: Index | None) -> Path:
    """Writes one self-contained HTML page, with pictures as far as they can be had."""
    dropped = dropped_pictures(Path(stats.path) if index is None else index.folder, stats.drops)
    return write_stats_page(path, stats, kept=[] if index is None else sample_pictures(index), dropped=dropped)


def in_words(stats: DataStats) -> list[str]:
    """The same for a terminal, line by line; what needs attention is in capitals."""
    lines = [
        f"{stats.path}: {stats.samples:,} samples in {stats.shards:,} shards, {format_count(stats.num_bytes)}B, "
        f"{stats.duration_s / 3600:.2f} hours of video"
    ]
    if stats.looked_at is not None:
        lines.append(f"{stats.looked_at:,} clips were looked at, {100 * stats.samples / max(1, stats.looked_at):.1f}% kept")
    if stats.empty_captions:
        lines.append(f"{stats.empty_captions:,} samples have an EMPTY CAPTION")
    lines.append("buckets (frames x height x width):" if stats.buckets else "NO SAMPLE: every clip was left out")
    for b in stats.buckets:
        tokens = f", {b.model_tokens:,} model tokens" if b.model_tokens else ""
        share = 100 * b.samples / stats.samples
        lines.append(f"  {b.bucket}: {b.samples:,} ({share:.1f}%), {b.text_tokens:.1f} text tokens{tokens}")
    for d in (*stats.distributions, *stats.scores):
        unit = f" ({d.unit})" if d.unit else ""
        lines.append(f"{d.name}{unit}: {d.lowest:.4g} to {d.highest:.4g}, median {d.median:.4g}")
    for name, counts in stats.classes.items():
        lines.append(f"{name}: " + ", ".join(f"{label} {count:,}" for label, count in counts.items()))
    if stats.drops:
        lines.append("left out by the preparation:")
        lines += [f"  {d.count:,} in {d.stage or 'preparation'}: {d.said} ({', '.join(d.examples)})" for d in stats.drops]
    return lines + (_training_in_words(stats.training) if stats.training else [])


def _training_in_words(training: TrainingStats) -> list[str]:
    lines = [f"{training.config}: {training.batch}, {training.steps_per_epoch:,} steps per epoch"]
    for b in training.buckets:
        loud = "" if b.used else "NO BATCH: "
        reason = f" ({b.reason})" if b.reason else ""
        lines.append(f"  {b.bucket}: {loud}{b.used:,} of {b.samples:,} samples used per epoch, in {b.steps:,} steps{reason}")
    lines += [f"  left out of each epoch: {what}: {count:,}" for what, count in training.left_out.items()]
    if training.efficiency is not None:
        lines.append(f"  {100 * training.efficiency:.1f}% of the budget of tokens is used")
    if training.imbalance is not None:
        lines.append(f"  the costliest pack of a step costs {100 * training.imbalance:.1f}% more than the mean")
    return lines
