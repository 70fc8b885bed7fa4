"""How long ten million samples take to open, and a step of them to plan; how full and how even the packs are.

    python benchmarks/order.py --out benchmarks/results/cpu/order.json

Writes an index of samples in the shares of Open-Sora 1.2's bucket table, a chunk at a time, with shards that are empty but for their size.
Then, in a process of its own, opens it and plans steps by each way of batching. Peak memory is of that process, beyond what it had after
its imports. Steps are taken from anywhere in the first three epochs, so that nothing is warm but the code. Packs are those of as many
ranks as ``--packs`` says: filled is the share of the token budget that is used, imbalance is the costliest pack over the mean, by the
FLOPs of the published STDiT-XL/2 (``VideoTransformer.flops``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_dist.config.codec import DctCodecConfig, HashTextConfig
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.train import DataConfig, ModelConfig, RectifiedFlowConfig
from opensora_dist.core.index import RowChunk, SampleShape, ShardRow, write_index_chunks
from opensora_dist.core.io import read_json, write_json
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import Order, build_order
from opensora_dist.models.base import VideoTransformer
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.keys import Keys
from opensora_dist.recipes.build import meta_model

# hpcaitech/Open-Sora, configs/opensora-v1-2/train/stage2.py at 0e70e4b0, up to 720p: frames to the probability that a clip which is large
# and long enough is put there (where the table has two, their product). Samples are given out in these shares.
OPEN_SORA_1_2: dict[str, dict[int, float]] = {
    "144p": {1: 1.0, 51: 1.0, 102: 0.33, 204: 0.1, 408: 0.1},
    "256": {1: 0.4, 51: 0.5, 102: 0.165, 204: 0.5, 408: 0.5},
    "240p": {1: 0.3, 51: 0.4, 102: 0.132, 204: 0.4, 408: 0.4},
    "360p": {1: 0.5, 51: 0.15, 102: 0.15, 204: 0.3, 408: 0.25},
    "512": {1: 0.4, 51: 0.15, 102: 0.08, 204: 0.2, 408: 0.2},
    "480p": {1: 0.5, 51: 0.2, 102: 0.2, 204: 0.1},
    "720p": {1: 0.1, 51: 0.03},
}
# Height and width at 16:9, rounded up to whole patches (16 pixels).
SIZES = {
    "144p": (144, 256),
    "256": (256, 256),
    "240p": (240, 432),
    "360p": (368, 640),
    "512": (512, 512),
    "480p": (480, 864),
    "720p": (720, 1280),
}
# As that release's VAE makes latents: 8 x 8 pixels, 17 frames to 5.
SPEC = DatasetSpec(
    codec=DctCodecConfig(channels=4),
    text=HashTextConfig(width=64, max_tokens=300),
    channels=4,
    spatial_factor=8,
    temporal_factor=1,
    text_width=64,
    max_tokens=300,
    latent_mean=(0.0,) * 4,
    latent_std=(1.0,) * 4,
    fps=24.0,
    buckets=((1, 144, 256),),
)
CHUNK_ROWS = 1 << 18
SHARD_ROWS = 1000


def bucket_shares() -> dict[SampleShape, float]:
    """Shape to its share of the samples."""
    total = sum(p for by_frames in OPEN_SORA_1_2.values() for p in by_frames.values())
    shares = {}
    for name, by_frames in OPEN_SORA_1_2.items():
        height, width = SIZES[name]
        for frames, probability in by_frames.items():
            latent = Thw(frames // 17 * 5 or 1, height // 8, width // 8)
            shape = SampleShape(clip=Thw(frames, height, width), latent=latent, dtype="float16")
            shares[shape] = probability / total
    return shares


def write_samples(folder: Path, *, rows: int, seed: int = 0) -> None:
    """Writes an index of so many samples, and shards that take no room on the disk."""
    shares = bucket_shares()
    shapes, rng = list(shares), np.random.default_rng(seed)
    latents = np.array([s.latents_bytes(SPEC.channels) for s in shapes])
    frames = np.array([s.latent.t for s in shapes])
    shape = rng.choice(len(shapes), size=rows, p=list(shares.values())).astype(np.int16)
    tokens = rng.integers(20, SPEC.max_tokens + 1, size=rows).astype(np.int32)
    shards = []
    for first in range(0, rows, SHARD_ROWS):
        some = slice(first, first + SHARD_ROWS)
        size = int((latents[shape[some]] + tokens[some] * SPEC.text_width * 2 + 1024).sum())
        name = f"{first // SHARD_ROWS:06d}.tar"
        with open(folder / name, "wb") as file:
            file.truncate(size)
        shards.append(ShardRow(name=name, num_bytes=size, num_samples=len(shape[some]), xxh3="0" * 16))

    def chunks() -> Iterator[RowChunk]:
        for first in range(0, rows, CHUNK_ROWS):
            number = np.arange(first, min(first + CHUNK_ROWS, rows))
            mine, text = latents[shape[number]], tokens[number] * SPEC.text_width * 2
            # A sample's place in its shard; chunks end within shards, so they are counted from the shard's first row.
            start = first // SHARD_ROWS * SHARD_ROWS
            whole = latents[shape[start : number[-1] + 1]] + tokens[start : number[-1] + 1] * SPEC.text_width * 2 + 1024
            before = np.cumsum(whole) - whole
            shard_start = (np.arange(start, number[-1] + 1) // SHARD_ROWS) * SHARD_ROWS - start
            offset = (before - before[shard_start])[number - start]
            yield RowChunk(
                key=[f"clip-{n:09d}-of-a-source-with-some-name" for n in number],
                shard=(number // SHARD_ROWS).astype(np.int32),
                shape=shape[number],
                latents_offset=offset + 512,
                text_offset=offset + 1024 + mine,
                text_tokens=tokens[number],
                hashes=rng.integers(0, 1 << 63, size=int((frames[shape[number]] + 1).sum()), dtype=np.uint64),
                caption=["a caption of some length that says what happens in the clip"] * len(number),
                source=["some/folder/video.mp4"] * len(number),
            )
            assert (text > 0).all()

    write_index_chunks(folder, chunks=chunks(), shapes=shapes, shards=shards, spec=SPEC.model_dump(mode="json"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is planned."""

    packs: int
    unit_tokens: int
    steps: int


def model_of_it() -> VideoTransformer:
    """STDiT-XL/2, without its weights."""
    return meta_model(ModelConfig(size="XL"), RectifiedFlowConfig(), SPEC)[0]


def order_of(index: Index, data: DataConfig, model: VideoTransformer) -> Order:
    """The order that training would have."""
    return build_order(
        index,
        data,
        keys=Keys(0),
        tokens_of=lambda latent: model.token_grid(latent).volume,
        cost_of=lambda latent, text_tokens: model.flops(latent, text_tokens=text_tokens),
    )


def measure_order(index: Index, batching: str, setting: Setting) -> dict[str, Any]:
    """Plans steps by one way of batching."""
    model = model_of_it()
    unit_tokens = None if batching == "samples" else setting.unit_tokens
    global_batch = 8 * setting.packs if batching == "samples" else setting.packs
    began = time.perf_counter()
    order = order_of(index, DataConfig(batching=batching, global_batch=global_batch, unit_tokens=unit_tokens), model)
    build_s = time.perf_counter() - began
    steps = np.random.default_rng(1).integers(0, 3 * order.batches_per_epoch, size=setting.steps).tolist()
    times, filled, imbalance, samples, left_out = [], [], [], [], 0
    tokens_of = {s.latent: model.token_grid(s.latent).volume for s in index.shapes}
    for step in steps:
        began = time.perf_counter()
        batch = order.batch(step)
        times.append((time.perf_counter() - began) * 1e3)
        samples.append(len(batch.rows))
        left_out += len(batch.left_out)
        if unit_tokens is not None:
            costs = {s.latent: model.flops(s.latent, text_tokens=batch.text_tokens) for s in index.shapes}
            latents = [[index.latent_shape(row) for row in unit] for unit in batch.units]
            tokens = [sum(tokens_of[latent] for latent in unit) for unit in latents]
            cost = [sum(costs[latent] for latent in unit) for unit in latents]
            assert max(tokens) <= unit_tokens
            filled.append(sum(tokens) / (len(tokens) * unit_tokens))
            imbalance.append(max(cost) * len(cost) / sum(cost) - 1)
    found: dict[str, Any] = {
        "batching": batching,
        "global_batch": global_batch,
        "build_s": round(build_s, 3),
        "steps_per_epoch": order.batches_per_epoch,
        "samples_per_step": round(statistics.mean(samples), 1),
        "step_ms": {"median": round(statistics.median(times), 3), "most": round(max(times), 3), "steps": len(times)},
        "left_out": order.dropped,
    }
    if unit_tokens is not None:
        found["unit_tokens"] = unit_tokens
        found["filled"] = {"mean": round(statistics.mean(filled), 4), "least": round(min(filled), 4)}
        found["imbalance"] = {"mean": round(statistics.mean(imbalance), 4), "most": round(max(imbalance), 4)}
        found["left_out_of_steps"] = left_out / sum(samples)
    return found


def measure(folder: Path, setting: Setting) -> dict[str, Any]:
    """What a fresh process sees."""
    before_kib = _memory("VmRSS")
    began = time.perf_counter()
    index = Index.open(folder)
    open_s = time.perf_counter() - began
    opened_mib = (_memory("VmHWM") - before_kib) / 1024
    ways = [measure_order(index, batching, setting) for batching in ("samples", "tokens", "packed")]
    return {
        "rows": len(index),
        "shards": len(index.shards),
        "index_mib": round(sum(p.stat().st_size for p in folder.glob("index*")) / 2**20),
        "open_s": round(open_s, 3),
        "open_peak_mib": round(opened_mib),
        "peak_mib": round((_memory("VmHWM") - before_kib) / 1024),
        "ways": ways,
    }


def _memory(what: str) -> int:
    """Of this process, in KiB: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--packs", type=int, default=64)
    parser.add_argument("--unit-tokens", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="Where the index is, or is written and kept; default: written and removed.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = Setting(packs=args.packs, unit_tokens=args.unit_tokens, steps=args.steps)
    if args.measure:
        write_json(args.out, measure(args.folder, setting))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="order-"))
    try:
        if not (folder / "index.parquet").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_samples(folder, rows=args.rows)
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--folder", str(folder), "--measure"]
        subprocess.run(command, check=True, timeout=600)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    found = read_json(args.out)
    write_json(args.out, {"environment": describe_environment(), "setting": asdict(setting), **found})
    print(f"{found['rows']:,} samples open in {found['open_s']} s; at most {found['peak_mib']} MiB beyond the imports")
    for way in found["ways"]:
        even = f", filled {way['filled']['mean']:.1%}, imbalance {way['imbalance']['mean']:.2%}" if "filled" in way else ""
        print(f"{way['batching']}: a step in {way['step_ms']['median']} ms (at most {way['step_ms']['most']}){even}")


if __name__ == "__main__":
    main()
