"""What each memory lever saves, and what it costs: the peak of a training step, and its time, against a step without levers.

    python benchmarks/memory.py --out benchmarks/results/cpu --page docs/memory.md

Real steps of a whole STDiT in float32 with random weights and inputs: forward, backward, clip, AdamW. First one rank under the levers of
``parallel.recompute``, ``offload_activations``, ``tile_tokens`` and ``zero.offload``; then two ranks under ZeRO stages, with the same
number of samples on each. Writes ``memory.json``; prints tables, and puts them into a page.

Peak: the most bytes on the device in a step, weights and optimizer included; on a CPU, the storages of all tensors that operators made
(``LiveTensors``), less what would be in CPU memory beside a GPU. That is counted apart. Kept: what forward leaves for backward, on the
device. Each is of the second step, on the rank that holds most. Time: forms take turns round by round, each on a memory of its own; a
ratio is of two times of one round, the slowest rank's.
"""

# B samples of a rank, C latent channels, T H W latent frames, height, width, Y text tokens, E text width

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opensora_dist.config.train import ModelConfig, OptimConfig, ParallelConfig, RectifiedFlowConfig, ZeroConfig
from opensora_dist.core.io import read_json, write_json
from opensora_dist.core.types import Region, Thw
from opensora_dist.data.loader import MicroBatch
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.rectified_flow import RectifiedFlow
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.init import init_weights
from opensora_dist.models.levers import set_levers
from opensora_dist.models.registry import build_model
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh, build_mesh, process_group, resolve_device
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.memory import peak_memory, zero_parked
from opensora_dist.recipes.bench.page import write_table
from opensora_dist.train.step import TiledLoss, micro_loss

IO = ModelIo(in_channels=4, out_channels=4, text_width=512, max_tokens=120)
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The size of it all."""

    depth: int
    width: int
    heads: int
    latent: Thw
    batch: int
    tile: int
    rounds: int
    device: str

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(name="stdit", depth=self.depth, width=self.width, heads=self.heads)

    def forms(self, world: int) -> dict[str, ParallelConfig]:
        """What is measured, by name; the first is what the others are held against."""
        tiles, away = {"tile_tokens": self.tile}, {"offload_activations": True}
        if world == 1:
            return {
                "none": ParallelConfig(zero=ZeroConfig(stage=0)),
                "tile_tokens": _levers(0, **tiles),
                "recompute=selective": _levers(0, recompute="selective"),
                "recompute=full": _levers(0, recompute="full"),
                "recompute=full, tile_tokens": _levers(0, recompute="full", **tiles),
                "offload_activations": _levers(0, **away),
                "recompute=selective, offload_activations": _levers(0, recompute="selective", **away),
                "recompute=full, offload_activations": _levers(0, recompute="full", **away),
                "recompute=full, offload_activations, tile_tokens": _levers(0, recompute="full", **away, **tiles),
                "zero.offload=optimizer": _levers(0, "optimizer"),
                "all of these": _levers(0, "optimizer", recompute="full", **away, **tiles),
            }
        return {
            **{f"zero.stage={stage}": _levers(stage) for stage in range(4)},
            "zero.stage=2, zero.offload=optimizer": _levers(2, "optimizer"),
            "zero.stage=3, zero.offload=optimizer": _levers(3, "optimizer"),
            "zero.stage=3, zero.offload=all": _levers(3, "all"),
            "zero.stage=3, recompute=full, offload_activations, tile_tokens": _levers(3, recompute="full", **away, **tiles),
        }


def _levers(stage: int, offload: str = "none", **levers: Any) -> ParallelConfig:
    return ParallelConfig(zero=ZeroConfig.model_validate({"stage": stage, "offload": offload}), **levers)


class Training:
    """A model with its optimizer, and the batch that it is trained on."""

    def __init__(self, setting: Setting, mesh: Mesh, parallel: ParallelConfig) -> None:
        self.setting, self.mesh, self.keys = setting, mesh, Keys(0)
        with torch.device("meta"):
            self.model: VideoTransformer = build_model(setting.model, IO)
        self.backend: ZeroBackend = build_backend(
            self.model,
            mesh=mesh,
            units=list(self.model.blocks),
            init=lambda model: init_weights(model, keys=self.keys),
            parallel=parallel,
            optim=OptimConfig(),
            compute_dtype=torch.float32,
        )
        self.zero_parked = zero_parked(self.backend, parallel.zero.offload)
        self.micro = self._micro()
        self.objective: Objective
        self.set(parallel)

    def set(self, parallel: ParallelConfig) -> None:
        """The levers that may change from step to step: those of activations."""
        self.offload = set_levers(self.model, parallel, device=self.mesh.device)
        self.objective = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
        if parallel.tile_tokens is not None:
            self.objective = TiledLoss(of=self.objective, positions=parallel.tile_tokens * self.model.patch.volume)

    def _micro(self) -> MicroBatch:
        setting, generator = self.setting, self.keys.generator("batch", self.mesh.rank)
        B, latent = setting.batch, setting.latent

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape).normal_(generator=generator).to(self.mesh.device)

        return MicroBatch(
            latents_BCthw=normal(B, IO.in_channels, *latent),
            latent=latent,
            region=Region.whole(latent),
            text_BYE=normal(B, IO.max_tokens, IO.text_width),
            text_mask_BY=torch.ones(B, IO.max_tokens, dtype=torch.bool, device=self.mesh.device),
            samples=tuple(B * self.mesh.rank + i for i in range(B)),
            keys=("",) * B,
            weight_B=torch.full((B,), 1 / (B * self.mesh.world * latent.volume), dtype=torch.float64, device=self.mesh.device),
        )

    def step(self, between: Callable[[], None] = lambda: None) -> None:
        """One; ``between`` is called when forward is over."""
        with self.backend.forward_context(last_micro=True):
            loss = micro_loss(self.backend.model, [self.micro], objective=self.objective, keys=self.keys, step=0, shards=[None])
            between()
            self.backend.backward(loss)
        self.backend.clip(1.0)
        self.backend.step(lr=1e-4)

    @property
    def parked_bytes(self) -> int:
        """What is in CPU memory now, beside a GPU."""
        return self.zero_parked() + (self.offload.parked_bytes if self.offload is not None else 0)


def memory(setting: Setting, mesh: Mesh, parallel: ParallelConfig) -> dict[str, int]:
    """Bytes of a form, the largest over ranks."""
    made: list[Training] = []
    kept = host = 0
    with peak_memory(mesh.device, parked=lambda: made[0].parked_bytes if made else 0) as peak:
        made.append(Training(setting, mesh, parallel))
        training = made[0]
        training.step()
        peak.restart()
        static = peak.now()

        def between() -> None:
            nonlocal host, kept
            kept, host = peak.now() - static, training.parked_bytes

        training.step(between)
    found = torch.tensor([peak.bytes, kept, host], dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.control)
    return dict(zip(("peak_bytes", "kept_bytes", "host_bytes"), map(int, found)))


def times(setting: Setting, mesh: Mesh, forms: dict[str, ParallelConfig]) -> dict[str, list[float]]:
    """Seconds of a step of each form, round by round: the slowest rank's."""
    by_zero: dict[ZeroConfig, Training] = {}
    for parallel in forms.values():
        if parallel.zero not in by_zero:
            by_zero[parallel.zero] = Training(setting, mesh, parallel)
    found = torch.zeros(setting.rounds + 1, len(forms), dtype=torch.float64)
    for r in range(setting.rounds + 1):  # the first one is not counted
        order = [(i + r) % len(forms) for i in range(len(forms))]
        for i in order:
            parallel = list(forms.values())[i]
            training = by_zero[parallel.zero]
            training.set(parallel)
            dist.barrier(group=mesh.control)
            began = time.perf_counter()
            training.step()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize(mesh.device)
            found[r, i] = time.perf_counter() - began
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.control)
    return {name: found[1:, i].tolist() for i, name in enumerate(forms)}


def measure(setting: Setting, mesh: Mesh) -> list[dict[str, Any]]:
    """Rows of a world, against the first."""
    forms = setting.forms(mesh.world)
    bytes_of = {}
    for name, parallel in forms.items():
        bytes_of[name] = memory(setting, mesh, parallel)
        if mesh.is_main:
            print(f"{mesh.world} ranks, {name}: {bytes_of[name]['peak_bytes'] / 1e6:,.1f} MB", file=sys.stderr, flush=True)
    seconds = times(setting, mesh, forms)
    first = next(iter(forms))
    rows = []
    for name in forms:
        ratios = [a / b for a, b in zip(seconds[name], seconds[first])]
        ratio = Spread.of(ratios)
        rows.append(
            {
                "name": name,
                **bytes_of[name],
                "peak_ratio": round(bytes_of[name]["peak_bytes"] / bytes_of[first]["peak_bytes"], 4),
                "seconds": seconds[name],
                "time_ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
            }
        )
    return rows


def _rank(rank: int, world: int, port: int, setting: Setting, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    device = resolve_device(setting.device)
    with process_group(device, timeout_s=TIMEOUT_S):
        mesh = build_mesh(device, dp_replicate=1, sp=ParallelConfig().sp, timeout_s=TIMEOUT_S)
        rows = measure(setting, mesh)
        if mesh.is_main:
            write_json(out, {"threads": torch.get_num_threads(), "rows": rows})


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    shown = found["settings"]
    latent = " x ".join(map(str, shown["latent"]))
    lines = [
        f"STDiT of {shown['depth']} blocks, width {shown['width']}, latents {latent}, {shown['batch']} sample(s) a rank, "
        f"tiles of {shown['tile']} tokens, {shown['dtype']}; medians, lowest and highest of {shown['rounds']} rounds on {found['cpu']}, "
        f"{found['cpu_cores']} cores, torch {found['torch']}.",
        "",
    ]
    for world, of in found["worlds"].items():
        lines += [
            f"{world} rank{'s' if world != '1' else ''}:",
            "",
            "| levers | peak, MB | of the first | kept by forward, MB | in CPU memory, MB | time of the first |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in of["rows"]:
            time_ratio = row["time_ratio"]
            spread = f"{time_ratio['median']:.2f} ({time_ratio['low']:.2f}, {time_ratio['high']:.2f})"
            mb = [f"{row[key] / 1e6:,.1f}" for key in ("peak_bytes", "kept_bytes", "host_bytes")]
            lines.append(f"| `{row['name']}` | {mb[0]} | {row['peak_ratio']:.2f} | {mb[1]} | {mb[2]} | {spread} |")
        lines.append("")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", default="8x24x24", help="frames x height x width of a sample's latents; a token is 1x2x2")
    parser.add_argument("--batch", type=int, default=1, help="samples of a rank")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tile", type=int, default=256, help="tokens of a tile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="ranks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for memory.json")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    given = parser.parse_args(args)
    setting = Setting(
        depth=given.depth,
        width=given.width,
        heads=given.heads,
        latent=Thw(*map(int, given.latent.split("x"))),
        batch=given.batch,
        tile=given.tile,
        rounds=given.rounds,
        device=given.device,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    worlds = {}
    for world in given.worlds:
        part = given.out / f"memory-{world}.part.json"
        mp.spawn(_rank, args=(world, _free_port(), setting, part), nprocs=world)
        worlds[str(world)] = read_json(part)
        part.unlink()
    environment = describe_environment()
    about = {key: environment[key] for key in ("cpu", "cpu_cores", "platform", "git")} | {"torch": torch.__version__}
    shown = {key: getattr(setting, key) for key in ("depth", "width", "heads", "batch", "tile", "rounds", "device")}
    settings = {**shown, "latent": list(setting.latent), "dtype": "float32", "text_tokens": IO.max_tokens}
    found = {**about, "load_average": os.getloadavg()[0], "settings": settings, "worlds": worlds}
    write_json(given.out / "memory.json", found)
    print(markdown(found))
    if given.page:
        write_table(given.page, markdown(found))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
