"""One gradient rule: every layout of data parallelism, accumulation and ZeRO trains the same model."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dataset_factory import write_dataset
from torch.distributed.tensor import DTensor

from opensora_dist.config.train import (
    IddpmConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RectifiedFlowConfig,
    SpConfig,
    ZeroConfig,
)
from opensora_dist.core.types import Region, Share
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import Order
from opensora_dist.diffusion.draws import draw
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.local import whole
from opensora_dist.parallel.zero.native import NativeBackend
from opensora_dist.recipes.build import meta_model
from opensora_dist.train.ema import Ema
from opensora_dist.train.step import train_step

STEPS = 10
GLOBAL_BATCH = 4
# Two shapes, one of a single frame; captions of 1 to 6 tokens; counts that leave tails.
SAMPLES = {(3, 32, 48): 11, (1, 48, 32): 9}


@dataclass(frozen=True)
class Layout:
    world: int
    stage: int
    accum: int = 1
    dp_replicate: int = 1

    def __str__(self):
        return f"dp{self.world}-zero{self.stage}-accum{self.accum}-replicate{self.dp_replicate}"


LAYOUTS = [
    Layout(1, 0, accum=2),
    Layout(1, 2),
    Layout(1, 3),
    Layout(2, 0),
    Layout(2, 0, accum=2),
    Layout(2, 2),
    Layout(2, 2, accum=2),
    Layout(2, 3),
    Layout(2, 3, accum=2),
    Layout(4, 2, dp_replicate=2),
    Layout(4, 3, dp_replicate=2),
]
MODELS = {"stdit": RectifiedFlowConfig(caption_dropout=0.3), "dit": IddpmConfig(caption_dropout=0.3)}


class _Spy(NativeBackend):
    """Keeps each step's summed gradients, before clipping."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.grads = []

    def clip(self, max_norm):
        self.grads.append({name: _full(p.grad).clone() for name, p in self.params.items()})
        return super().clip(max_norm)


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _randomise(model):
    """Every parameter, those that start at zero included: zeros hide wrong gradients."""
    for name, tensor in model.state_dict().items():
        full = torch.empty(tensor.shape, dtype=torch.float64).normal_(std=0.1, generator=Keys(7).generator(f"test:{name}"))
        if isinstance(tensor, DTensor):
            from torch.distributed.tensor import distribute_tensor

            shard = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(shard.to_local())
        else:
            tensor.copy_(full)


def _trajectory(folder: str, name: str, layout: Layout):
    mesh = build_mesh(torch.device("cpu"), dp_replicate=layout.dp_replicate, sp=SpConfig(), timeout_s=60)
    keys, index = Keys(3), Index.open(Path(folder))
    config = ModelConfig(name=name, depth=2, width=20, heads=2, patch=(1, 1, 2))
    model, objective = meta_model(config, MODELS[name], index.spec, dtype=torch.float64)
    backend = _Spy(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=_no_grad(_randomise),
        parallel=ParallelConfig(dp_replicate=layout.dp_replicate, zero=ZeroConfig(stage=layout.stage)),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        compute_dtype=torch.float64,
    )
    ema = Ema(backend.params, decay=0.9)
    losses, norms, drawn = [], [], {}
    loader = Loader(
        index,
        Order(index, keys=keys, global_batch=GLOBAL_BATCH),
        share=lambda latent: Share(mesh.data_rank, mesh.data_size, Region.whole(latent)),
        accum=layout.accum,
        start_step=0,
        num_steps=STEPS,
        loss_weight="sample",
        reader_threads=1,
        prefetch_batches=2,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    for data in loader:
        result = train_step(
            backend,
            data,
            objective=objective,
            keys=keys,
            shards=lambda latent: whole(model.token_grid(latent)),
            agree=lambda micro: None,
            lr=1e-3,
            clip_norm=0.5,
        )
        ema.update(step=data.step)
        loss = result.loss.clone()
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(result.grad_norm.item())
        for micro in data.micros:
            channels = micro.latents_BCthw.shape[1]
            draws = draw(
                keys,
                objective,
                samples=micro.samples,
                step=data.step,
                channels=channels,
                latent=micro.latent,
                region=micro.region,
            )
            for i, key in enumerate(micro.keys):
                digest = hashlib.sha256(draws.noise_BCthw[i].numpy().tobytes()).hexdigest()
                drawn[data.step, key] = (digest, draws.level_B[i].item(), draws.drop_caption_B[i].item())
    params = {n: _full(p).detach().clone() for n, p in backend.params.items()}
    averaged = {n: _full(p).clone() for n, p in ema.shadow.items()}
    return {"losses": losses, "norms": norms, "drawn": drawn, "grads": backend.grads, "params": params, "ema": averaged}


def _no_grad(function):
    return torch.no_grad()(function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trajectory")
    write_dataset(path, samples=SAMPLES)
    return str(path)


@pytest.fixture(scope="module")
def one_process(ranks, folder):
    return {name: ranks.run(_trajectory, folder, name, Layout(1, 0), world=1)[0] for name in MODELS}


@pytest.mark.parametrize("name, layout", list(itertools.product(MODELS, LAYOUTS)), ids=str)
def test_layout_matches_one_process_to_1e_10_in_float64(ranks, folder, one_process, name, layout):
    found = ranks.run(_trajectory, folder, name, layout, world=layout.world)
    wanted = one_process[name]
    drawn = {key: value for answer in found for key, value in answer["drawn"].items()}
    assert drawn == wanted["drawn"], "noise, level or caption dropout of a sample depends on the layout"
    for answer in found:
        torch.testing.assert_close(answer["losses"], wanted["losses"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer["norms"], wanted["norms"], rtol=1e-10, atol=1e-10)
        for kind in ("params", "ema"):
            torch.testing.assert_close(answer[kind], wanted[kind], rtol=1e-10, atol=1e-10)
        for step in range(STEPS):
            torch.testing.assert_close(answer["grads"][step], wanted["grads"][step], rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient_in_one_process(one_process):
    for name, answer in one_process.items():
        still = [n for n, g in answer["grads"][0].items() if not g.abs().max() > 0]
        assert not still, f"{name}: {still}"
    assert len(set(one_process["stdit"]["losses"])) == STEPS
