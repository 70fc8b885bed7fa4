"""What a checkpoint costs training: an asynchronous save against a synchronous one of the same run, and steps beside a write.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --out benchmarks/results/cpu/checkpoint.json

One process trains STDiT and saves weights, both moments and the average with the run's own ``Saver``. Each round makes one synchronous
and one asynchronous save, in turn first and second, so that both meet the same disk. The stall is what training waits: the whole of a
synchronous save; of an asynchronous one the copy. Steps that ran from start to end while the write was under way are held against
steps of the same round without one; they share cores, memory and the interpreter with it. The first asynchronous save, which makes the
buffers, is told apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opensora_dist.config.codec import DctCodecConfig, HashTextConfig
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.train import CheckpointConfig, ModelConfig, ModelSize, RunConfig, SpConfig, TrainConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Thw
from opensora_dist.models.init import init_weights
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh, build_mesh, process_group
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.recipes.build import meta_model
from opensora_dist.train.ema import Ema
from opensora_dist.train.saving import Saver, TrainerState

BAR = 0.10
"""The asynchronous stall is to be at most this share of the synchronous one."""

STEPS = 2  # without a save, per round
LATENT, TEXT_TOKENS, TEXT_WIDTH = Thw(2, 8, 8), 8, 64
SIZES = {"20M": ModelSize(depth=12, width=288, heads=6), "110M": ModelSize(depth=12, width=672, heads=12)}


@dataclass
class Run:
    """A model in training, and both ways of saving it."""

    backend: ZeroBackend
    ema: Ema
    savers: dict[str, Saver]
    step: int = 0
    text: torch.Tensor = field(default_factory=lambda: torch.ones(1, TEXT_TOKENS, TEXT_WIDTH))

    def train(self) -> float:
        """One step; its seconds."""
        began = time.perf_counter()
        x = torch.empty(1, 4, *LATENT).normal_(generator=Keys(0).generator(f"x:{self.step}"))
        with self.backend.forward_context(last_micro=True):
            self.backend.backward(self.backend.model(x, torch.tensor([500.0]), self.text, None).square().mean())
        self.backend.clip(1.0)
        self.backend.step(lr=1e-4)
        self.ema.update(step=self.step, skipped=self.backend.skipped())
        self.step += 1
        return time.perf_counter() - began

    def save(self, how: str) -> dict[str, Any]:
        """One save, with steps beside it where it goes on without them."""
        self.train()  # a checkpoint of its own, and a state that is in nobody's cache
        saver = self.savers[how]
        state = TrainerState(step=self.step, optimizer_steps=self.step, samples=0, tokens=0, seed=0, dataset_hash="none")
        began = time.perf_counter()
        saver.begin(self.backend, self.ema, state)
        stall_s, beside, outcome = time.perf_counter() - began, [], saver.poll()
        while outcome is None:
            took = self.train()
            outcome = saver.poll()
            if outcome is None:
                beside.append(took)
        if outcome.error is not None:
            raise outcome.error
        return {"stall_s": stall_s, "seconds": outcome.seconds, "beside_s": beside}


def build_run(mesh: Mesh, size: ModelSize, folder: Path) -> Run:
    """A model of a size, with drawn weights, and its savers."""
    model_config = ModelConfig(name="stdit", depth=size.depth, width=size.width, heads=size.heads)
    config = TrainConfig(run=RunConfig(dir=str(folder)), model=model_config)
    spec = DatasetSpec(
        codec=DctCodecConfig(), text=HashTextConfig(), channels=4, spatial_factor=8, temporal_factor=1, text_width=TEXT_WIDTH,
        max_tokens=TEXT_TOKENS, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4, fps=8.0, buckets=((2, 64, 64),),
    )  # fmt: skip
    model, _ = meta_model(config.model, config.objective, spec)
    backend = build_backend(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=lambda m: init_weights(m, Keys(0)),  # type: ignore[arg-type]
        parallel=config.parallel,
        optim=config.optim,
        compute_dtype=torch.float32,
    )
    savers = {}
    for how in ("synchronous", "asynchronous"):
        checkpoint = CheckpointConfig(asynchronous=how == "asynchronous", keep_last=1)
        savers[how] = Saver(folder, config=config.model_copy(update={"checkpoint": checkpoint}), spec=spec, mesh=mesh)
    return Run(backend, Ema(backend.weights, decay=0.99), savers)


def measure(mesh: Mesh, size: ModelSize, *, rounds: int, work: Path) -> dict[str, Any]:
    """All rounds of one size."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        run = build_run(mesh, size, Path(folder))
        run.train()
        first = run.save("asynchronous")
        found = []
        for number in range(rounds):
            alone = [run.train() for _ in range(STEPS)]
            order = ("synchronous", "asynchronous") if number % 2 else ("asynchronous", "synchronous")
            saves = {how: run.save(how) for how in order}
            found.append({"alone_s": statistics.median(alone), **saves})
        written = sum(p.stat().st_size for p in Path(folder).glob("checkpoints/step-*/**/*") if p.is_file())
    slowdowns = [statistics.median(r["asynchronous"]["beside_s"]) / r["alone_s"] for r in found if r["asynchronous"]["beside_s"]]
    return {
        "parameters": run.backend.num_parameters,
        "checkpoint_bytes": written,
        "first_asynchronous_stall_s": round(first["stall_s"], 4),
        "stall_s": {how: spread([r[how]["stall_s"] for r in found]) for how in run.savers},
        "whole_s": {how: spread([r[how]["seconds"] for r in found]) for how in run.savers},
        "stall_ratio": spread([r["asynchronous"]["stall_s"] / r["synchronous"]["stall_s"] for r in found]),
        "step_alone_s": spread([r["alone_s"] for r in found]),
        "step_beside_a_write": spread(slowdowns) if slowdowns else None,
        "steps_beside": sum(len(r["asynchronous"]["beside_s"]) for r in found),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="parameters; a checkpoint has 16 bytes of each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(), help="a folder on the disk to measure (default: this one)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cpu")
    rows = {}
    with process_group(device, timeout_s=600):
        mesh = build_mesh(device, dp_replicate=1, sp=SpConfig(), timeout_s=600)
        for name in args.sizes:
            row = rows[name] = measure(mesh, SIZES[name], rounds=args.rounds, work=args.work)
            stalls = " ".join(f"{how} {row['stall_s'][how]['median']:.3f} s" for how in row["stall_s"])
            ratio, beside = row["stall_ratio"], row["step_beside_a_write"]
            slower = f", steps beside a write x {beside['median']:.2f}" if beside else ""
            print(
                f"{row['parameters']:,} parameters, {row['checkpoint_bytes'] / 1e6:,.0f} MB: stall {stalls}, ratio "
                f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f}), at most {BAR}: "
                f"{'kept' if ratio['median'] <= BAR else 'not kept'}{slower}",
                flush=True,
            )
    if args.out is not None:
        environment = describe_environment()
        about = {key: environment[key] for key in ("cpu", "cpu_cores", "platform", "git")}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
        write_json(args.out, {**about, "bar": BAR, "settings": {"rounds": args.rounds, "dtype": "float32"}, "rows": rows})


if __name__ == "__main__":
    main()
