"""What every ZeRO backend must do, by the backend's name; and the same training by plain torch, to compare with.

Functions of a ``Case`` run inside ranks. Imports nothing but torch, pytest and the package, so that an environment of its own can run them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from opensora_dist.config.train import ModelConfig, OptimConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.types import Region, Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.local import whole
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.parallel.zero.fragments import Fragments, Span
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.train.ema import Ema

STEPS = 10
GLOBAL_BATCH = 12
LATENT, CHANNELS = Thw(3, 4, 6), 4
TEXT_TOKENS, TEXT_WIDTH = 5, 8
CLIP, EMA_DECAY = 0.5, 0.9
# A key's bias has no gradient but rounding (softmax ignores it); with a smaller epsilon AdamW would make whole steps of that.
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
KINDS = ("model", "exp_avg", "exp_avg_sq", "ema")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Rounding to bfloat16 moves a training; where it is sharded, by about as much as in one process.
BFLOAT16_RATIO = (0.3, 2.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    backend: str
    stage: int
    dtype: str = "float32"
    accum: int = 1
    offload: str = "none"
    world: int = 2
    sp: int = 1
    prefetch: int = 1

    def __str__(self):
        more = [f"-{self.offload}" if self.offload != "none" else "", f"-sp{self.sp}" if self.sp > 1 else ""]
        return f"{self.backend}-zero{self.stage}-{self.dtype}-accum{self.accum}-world{self.world}{''.join(more)}"

    @property
    def parallel(self):
        zero = ZeroConfig(backend=self.backend, stage=self.stage, offload=self.offload, prefetch=self.prefetch)
        return ParallelConfig(grad_accum=self.accum, sp=SpConfig(degree=self.sp), zero=zero)


def meta_model(dtype):
    config = ModelConfig(name="stdit", depth=2, width=16, heads=2, patch=(1, 2, 2))
    io = ModelIo(in_channels=CHANNELS, out_channels=CHANNELS, text_width=TEXT_WIDTH, max_tokens=TEXT_TOKENS)
    with torch.device("meta"):
        return build_model(config, io).to(DTYPES[dtype])


@torch.no_grad()
def randomise(model):
    """Every parameter, those that start at zero included: zeros hide wrong gradients."""
    for name, tensor in model.state_dict().items():
        full = torch.empty(tensor.shape, dtype=torch.float64).normal_(std=0.1, generator=Keys(7).generator(f"test:{name}"))
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local())
        else:
            tensor.copy_(full)


def share_of_loss(model, *, step, samples, dtype, region=None, shard=None):
    """The sum over ``samples`` of their weighted squared errors; over all samples of a step and all regions it is the mean."""
    region = region or Region.whole(LATENT)
    drawn = [Keys(3).generator("test:sample", sample, step) for sample in samples]

    def draw(*shape):
        return torch.stack([torch.empty(shape, dtype=torch.float64).normal_(generator=g) for g in drawn]).to(DTYPES[dtype])

    x, target = (draw(CHANNELS, *LATENT)[:, :, region.t0 : region.t1, region.h0 : region.h1] for _ in range(2))
    text, level = draw(TEXT_TOKENS, TEXT_WIDTH), 999 * draw(1)[:, 0].sigmoid()  # bfloat16 has no 999
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([1 + sample % TEXT_TOKENS for sample in samples])[:, None]
    error = model(x, level, text, mask, shard=shard) - target
    return error.square().sum() / (GLOBAL_BATCH * CHANNELS * LATENT.volume)


class Run:
    """A backend around the model, fed by hand."""

    def __init__(self, case):
        self.case, parallel = case, case.parallel
        self.mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=parallel.sp, timeout_s=60)
        model = meta_model(case.dtype)
        sequences, grid = SequenceParallel(self.mesh, parallel.sp), model.token_grid(LATENT)
        self.shard, self.share = sequences.shard(grid), sequences.share(grid, patch=model.patch)
        self.backend = build_backend(
            model,
            mesh=self.mesh,
            units=list(model.blocks),
            init=randomise,
            parallel=parallel,
            optim=OPTIM,
            compute_dtype=torch.bfloat16 if case.dtype == "bfloat16" else DTYPES[case.dtype],
        )
        self.ema = Ema(self.backend.weights, decay=EMA_DECAY)

    def gradients(self, step, *, factor=1.0):
        """Forward and backward over the micro-batches of a step; this rank's share of the loss."""
        case, share, loss = self.case, self.share, torch.zeros(())
        each = GLOBAL_BATCH // (share.data_size * case.accum)
        for micro in range(case.accum):
            first = (micro * share.data_size + share.data_rank) * each
            with self.backend.forward_context(last_micro=micro == case.accum - 1):
                part = share_of_loss(
                    self.backend.model,
                    step=step,
                    samples=range(first, first + each),
                    dtype=case.dtype,
                    region=share.region,
                    shard=self.shard,
                )
                self.backend.backward(part * factor)
            loss = loss + part.detach()
        return loss

    def step(self, step, *, factor=1.0):
        """A whole step: the global loss and the gradient norm."""
        loss = self.gradients(step, factor=factor)
        norm = self.backend.clip(CLIP)
        self.backend.step(lr=OPTIM.lr)
        self.ema.update(step=step, skipped=self.backend.skipped())
        dist.all_reduce(loss)
        return loss.item(), norm.item()

    def state(self):
        """The canonical state, whole."""
        return {name: full(t).detach().clone() for name, t in self.backend.state_dict(ema=self.ema.shadow).items()}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trajectory(case, steps=STEPS):
    """Ten steps: what each saw, and where they ended."""
    run = Run(case)
    losses, norms = zip(*(run.step(step) for step in range(steps)))
    return {"losses": list(losses), "norms": list(norms), "steps": run.backend.optimizer_steps(), **by_kind(run.state())}


def by_kind(state):
    return {kind: {n.removeprefix(f"{kind}."): t for n, t in state.items() if n.startswith(f"{kind}.")} for kind in KINDS}


def plain(dtype, steps=STEPS, *, clip=CLIP):
    """The same training in one process, by torch alone: no backend, no sharding, no fused kernel, no micro-batches."""
    model = meta_model(dtype).to_empty(device="cpu")
    randomise(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = dict(model.named_parameters())
    decayed = {name for name, p in params.items() if p.ndim >= 2 and name.endswith(".weight")}
    groups = [
        {"params": [p for name, p in params.items() if (name in decayed) == decay], "weight_decay": OPTIM.weight_decay * decay}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False)
    ema, losses, norms = {name: t.clone() for name, t in start.items()}, [], []
    for step in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = share_of_loss(
                model, step=step, samples=range(GLOBAL_BATCH), dtype=dtype, shard=whole(model.token_grid(LATENT))
            )
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), clip).item())
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        ema = {name: decay * t + (1 - decay) * params[name].detach() for name, t in ema.items()}
        losses.append(loss.item())
    moments = {kind: {name: optimizer.state[p][kind] for name, p in params.items()} for kind in ("exp_avg", "exp_avg_sq")}
    model_state = {name: t.detach() for name, t in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "steps": steps, "model": model_state, **moments, "ema": ema, "start": start}


def assert_trains_alike(found, plain, *, dtype):
    """A trajectory against the plain ones, by dtype: float32, bfloat16 and float64."""
    if dtype == "bfloat16":
        _assert_rounded_alike(found, plain)
        return
    wanted, tolerance = plain[dtype], TOLERANCE[dtype]
    for what in ("losses", "norms", *KINDS):
        torch.testing.assert_close(found[what], wanted[what], rtol=tolerance, atol=tolerance)


def _assert_rounded_alike(found, plain):
    """As far from float32 as one process in bfloat16 is, no more and not much less: less would be another precision."""
    assert all(t.dtype == torch.float32 for kind in KINDS for t in found[kind].values())
    start = plain["float32"]["start"]
    one, here = (_distances(run, plain["float32"], start) for run in (plain["bfloat16"], found))
    low, high = BFLOAT16_RATIO
    ratios = {what: here[what] / one[what] for what in one}
    assert all(low < ratio < high for ratio in ratios.values()), ratios


def _distances(found, wanted, start):
    """How far a training is from another, by what is compared."""
    moments = {
        kind: torch.cat([(found[kind][n].double() - t.double()).flatten() for n, t in wanted[kind].items()]).norm().item()
        for kind in ("exp_avg", "exp_avg_sq", "ema")
    }
    return {
        "losses": math.dist(found["losses"], wanted["losses"]),
        "norms": math.dist(found["norms"], wanted["norms"]),
        "weights": (_moved(found, start) - _moved(wanted, start)).norm().item(),
        **moments,
    }


def _moved(found, start):
    """How far all weights went, as one vector."""
    return torch.cat([(t.double() - start[name].double()).flatten() for name, t in found["model"].items() if name in start])


def skips(case):
    """A step in which one rank's loss is not a number, between others: what it changed, and what the next one did."""
    run = Run(case)
    run.step(0)
    before, steps = run.state(), run.backend.optimizer_steps()
    broken = dist.get_rank() == dist.get_world_size() - 1
    run.gradients(1, factor=float("nan") if broken else 1.0)
    norm = run.backend.clip(CLIP)
    run.backend.step(lr=OPTIM.lr)
    run.ema.update(step=1, skipped=run.backend.skipped())
    after = run.state()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    answer = {
        "norm": norm.item(),
        "skipped": run.backend.skipped().item(),
        "changed": changed,
        "steps": (steps, run.backend.optimizer_steps()),
    }
    loss, norm = run.step(2)
    return {**answer, "next": (loss, norm), "next_skipped": run.backend.skipped().item(), "model": by_kind(run.state())["model"]}


class Stop(Exception):
    """What a test raises on purpose."""


def inference(case):
    """Outputs of the average, of the live weights, and of the live weights after a block that raised; and what was put back."""
    run = Run(case)
    for step in range(2):
        run.step(step)
    before = {name: t.clone() for name, t in run.backend.weights.items()}

    def error(weights=None, *, fail=False):
        with run.backend.inference(weights) as model:
            assert not model.training and not torch.is_grad_enabled()
            part = share_of_loss(model, step=9, samples=range(4), dtype=case.dtype, region=run.share.region, shard=run.shard)
            if fail:
                raise Stop
        dist.all_reduce(part)
        return part.item() / run.share.data_size

    live, averaged = error(), error(run.ema.shadow)
    with suppress(Stop):
        error(run.ema.shadow, fail=True)
    again = error()
    moved = [name for name, t in run.backend.weights.items() if not torch.equal(t, before[name])]
    state = by_kind(run.state())
    return {"live": live, "averaged": averaged, "again": again, "moved": moved, **state, "next": run.step(2)}


def error_of(tensors, dtype):
    """What ``inference`` measures, of a plain model with these weights."""
    model = meta_model(dtype).to_empty(device="cpu")
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        return share_of_loss(model.eval(), step=9, samples=range(4), dtype=dtype, shard=whole(model.token_grid(LATENT))).item()


def first_gradient(case):
    """The first moment after one step whose clip changes nothing: the gradient times 1 - beta1."""
    run = Run(case)
    run.gradients(0)
    norm = run.backend.clip(1e9)
    run.backend.step(lr=OPTIM.lr)
    return norm.item(), by_kind(run.state())["exp_avg"]


def plain_gradient():
    """What ``first_gradient`` returns, of one process with plain torch in float32."""
    found = plain("float32", 1, clip=1e9)
    return found["norms"][0], found["exp_avg"]


def offloaded_fragments():
    """Pieces in CPU memory, of ranks whose mesh is one of GPUs, to rows and back: the pieces, the rows, and what came back."""
    rank, mesh = dist.get_rank(), DeviceMesh.from_group(dist.group.WORLD, "cuda")
    span = Span(start=0, stop=7) if rank == 0 else Span(start=7, stop=10)
    fragments = Fragments({"w": span}, shapes={"w": torch.Size((5, 2))}, mesh=mesh)
    piece = torch.arange(10.0)[span.start : span.stop]
    rows, back = fragments.to_rows({"w": piece}), torch.zeros_like(piece)
    fragments.from_rows(rows, {"w": back})
    return piece, rows["w"].to_local(), back


def assert_same_gradient(found, wanted, *, dtype):
    """Norms and moments of ``first_gradient``: each parameter's distance over its length, which a wrong factor would make large."""
    norm, whole = wanted
    assert found[0] == pytest.approx(norm, rel=GRADIENT_TOLERANCE[dtype])
    tiny = 1e-3 * math.hypot(*(t.norm().item() for t in whole.values()))  # for what has no gradient but rounding
    far = {name: ((found[1][name] - t).norm() / (t.norm() + tiny)).item() for name, t in whole.items()}
    assert max(far.values()) < GRADIENT_TOLERANCE[dtype], far


def sent(case):
    """Bytes sent by this rank in a later step, by micro-batch, and by clip and step together; and the parameters' own size."""
    run = Run(case)
    run.step(0)
    counts = []
    each = GLOBAL_BATCH // (run.share.data_size * case.accum)
    for micro in range(case.accum):
        with SentBytes() as count, run.backend.forward_context(last_micro=micro == case.accum - 1):
            first = (micro * run.share.data_size + run.share.data_rank) * each
            part = share_of_loss(run.backend.model, step=1, samples=range(first, first + each), dtype=case.dtype, shard=run.shard)
            run.backend.backward(part)
        counts.append(count.by_collective)
    with SentBytes() as count:
        run.backend.clip(CLIP)
        run.backend.step(lr=OPTIM.lr)
    return {"micros": counts, "step": count.by_collective, "bytes": 4 * run.backend.num_parameters}
