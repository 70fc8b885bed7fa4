"""One gradient rule: every layout of data and sequence parallelism, accumulation and ZeRO trains the same model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dataset_factory import write_dataset
from spy import Spy, full, randomise

from opensora_dist.config.train import (
    DataConfig,
    IddpmConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RectifiedFlowConfig,
    SpConfig,
    ZeroConfig,
)
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.diffusion.draws import draw
from opensora_dist.models.levers import set_levers
from opensora_dist.models.tensor import share_blocks
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.recipes.build import meta_model
from opensora_dist.recipes.shards import LatentShards
from opensora_dist.train.ema import Ema
from opensora_dist.train.step import TiledLoss, train_step

STEPS = 10
GLOBAL_BATCH = 4
# Schemes for the attention of any model.
SHARED = [name for name in SCHEMES if name != "dsp"]
# Two shapes, one of a single frame; captions of 1 to 6 tokens; counts that leave tails.
SAMPLES = {(3, 32, 48): 11, (1, 48, 32): 9}


@dataclass(frozen=True)
class Layout:
    world: int
    stage: int
    accum: int = 1
    dp_replicate: int = 1
    sp: int = 1
    scheme: str = "dsp"
    tp: int = 1
    recompute: str = "none"
    offload: str = "none"
    activations: bool = False
    tile: int | None = None
    models: tuple[str, ...] = ("stdit", "dit")
    slow: bool = False

    def __str__(self):
        shared = f"-sp{self.sp}-{self.scheme}" if self.sp > 1 else ""
        shared += f"-tp{self.tp}" if self.tp > 1 else ""
        again = {"none": "", "selective": "-selective", "full": "-recompute"}[self.recompute]
        again += "-offload_activations" if self.activations else ""
        again += "-tiles" if self.tile else ""
        off = f"-offload_{self.offload}" if self.offload != "none" else ""
        return f"dp{self.world // self.sp // self.tp}{shared}-zero{self.stage}-accum{self.accum}-replicate{self.dp_replicate}{again}{off}"

    @property
    def config(self):
        ulysses = self.sp // 2 if self.scheme == "usp" else None
        return ParallelConfig(
            dp_replicate=self.dp_replicate,
            grad_accum=self.accum,
            sp=SpConfig(degree=self.sp, scheme=self.scheme, ulysses=ulysses),
            tp=self.tp,
            recompute=self.recompute,
            offload_activations=self.activations,
            tile_tokens=self.tile,
            zero=ZeroConfig(stage=self.stage, offload=self.offload),
        )


def _dsp(world, stage, **more):
    return Layout(world, stage, models=("stdit",), **more)


LAYOUTS = [
    Layout(1, 0, accum=2),
    Layout(1, 0, offload="optimizer"),
    Layout(1, 2, slow=True),
    Layout(1, 3),
    Layout(1, 0, recompute="full"),
    Layout(2, 0, slow=True),
    Layout(2, 0, accum=2),
    Layout(2, 0, accum=2, offload="optimizer", slow=True),
    Layout(2, 1, slow=True),
    Layout(2, 1, accum=2),
    Layout(2, 1, accum=2, offload="optimizer", slow=True),
    Layout(2, 2, slow=True),
    Layout(2, 2, accum=2),
    Layout(2, 3, slow=True),
    Layout(2, 2, accum=2, offload="all", slow=True),
    Layout(2, 3, offload="optimizer", slow=True),
    Layout(2, 3, accum=2, offload="all"),
    Layout(2, 3, accum=2, slow=True),
    Layout(2, 3, recompute="full", slow=True),
    Layout(2, 0, recompute="selective", tile=16),
    Layout(2, 2, accum=2, activations=True, tile=16, slow=True),
    Layout(2, 3, recompute="selective", activations=True, tile=16),
    Layout(4, 3, dp_replicate=2, slow=True),
    _dsp(2, 0, sp=2, slow=True),
    _dsp(2, 3, sp=2, accum=2, recompute="full"),
    _dsp(3, 2, sp=3, slow=True),
    _dsp(4, 0, sp=2, slow=True),
    _dsp(4, 2, sp=2, slow=True),
    _dsp(4, 3, sp=2, recompute="full", slow=True),
    _dsp(4, 3, sp=2, recompute="full", activations=True, tile=16),
    _dsp(4, 1, dp_replicate=2, sp=2, accum=2, slow=True),
    _dsp(4, 2, dp_replicate=2, sp=2, accum=2),
    _dsp(4, 3, dp_replicate=2, sp=2, slow=True),
    _dsp(4, 2, sp=4, slow=True),
    *(Layout(2, 0, sp=2, scheme=name, slow=True) for name in SHARED),
    *(Layout(2, 3, sp=2, scheme=name, slow=name != "fastseq") for name in ("fastseq", "ring")),
    *(Layout(4, 3, sp=2, scheme=name, recompute="full", slow=name != "ring") for name in SHARED),
    *(Layout(4, 2, sp=4, scheme=name, slow=True) for name in SHARED),
    Layout(2, 2, tp=2, accum=2),
    Layout(2, 3, tp=2, recompute="full", slow=True),
    Layout(2, 3, tp=2, recompute="selective", activations=True, tile=16),
    Layout(2, 3, tp=2, offload="all", slow=True),
    Layout(2, 1, tp=2, offload="optimizer", slow=True),
    Layout(4, 1, tp=2, accum=2, slow=True),
    Layout(4, 2, tp=2, slow=True),
    Layout(4, 3, tp=2),
    Layout(4, 2, tp=2, dp_replicate=2, slow=True),
    Layout(4, 3, tp=4, slow=True),
    _dsp(4, 2, tp=2, sp=2, slow=True),
    _dsp(4, 3, tp=2, sp=2, recompute="full", slow=True),
    *(Layout(4, 3, tp=2, sp=2, scheme=name, recompute="full", slow=name != "ulysses") for name in SHARED),
]
MODELS = {"stdit": RectifiedFlowConfig(caption_dropout=0.3), "dit": IddpmConfig(caption_dropout=0.3)}


def _trajectory(folder: str, name: str, layout: Layout):
    parallel = layout.config
    mesh = build_mesh(torch.device("cpu"), dp_replicate=parallel.dp_replicate, sp=parallel.sp, tp=parallel.tp, timeout_s=60)
    keys, index = Keys(3), Index.open(Path(folder))
    config = ModelConfig(name=name, depth=2, width=24, heads=4, patch=(1, 1, 2))
    model, objective = meta_model(config, MODELS[name], index.spec, dtype=torch.float64)
    set_levers(model, parallel, device=mesh.device, min_offload_bytes=0)
    if layout.tile is not None:
        objective = TiledLoss(of=objective, positions=layout.tile)
    share_blocks(model, mesh)
    shards = LatentShards(mesh, SequenceParallel(mesh, parallel.sp), model)
    backend = Spy(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=randomise,
        parallel=parallel,
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        compute_dtype=torch.float64,
    )
    ema = Ema(backend.weights, decay=0.9)
    losses, norms, drawn, levels = [], [], {}, {}
    loader = Loader(
        index,
        build_order(index, DataConfig(global_batch=GLOBAL_BATCH), keys=keys),
        share=shards.share,
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
            shards=shards.shard,
            agree=partial(shards.agree, data),
            lr=1e-3,
            clip_norm=0.5,
        )
        ema.update(step=data.step, skipped=backend.skipped())
        loss = result.loss * (mesh.tp_rank == 0)
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
                for place, frame in enumerate(micro.region.frames):
                    for line, row in enumerate(micro.region.rows):
                        drawn[data.step, key, frame, row] = draws.noise_BCthw[i, :, place, line].clone()
                levels.setdefault((data.step, key), set()).add((draws.level_B[i].item(), draws.drop_caption_B[i].item()))
    state = {name: full(t).detach().clone() for name, t in backend.state_dict(ema=ema.shadow).items()}
    params, averaged = (
        {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
        for kind in ("model", "ema")
    )
    return {
        "losses": losses,
        "norms": norms,
        "drawn": drawn,
        "levels": levels,
        "grads": backend.grads,
        "params": params,
        "ema": averaged,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trajectory")
    write_dataset(path, samples=SAMPLES)
    return str(path)


@pytest.fixture(scope="module")
def one_process(ranks, folder):
    return {name: ranks.run(_trajectory, folder, name, Layout(1, 0), world=1)[0] for name in MODELS}


CASES = [
    pytest.param(name, layout, id=f"{name}-{layout}", marks=pytest.mark.slow if layout.slow else ())
    for name, layout in itertools.product(MODELS, LAYOUTS)
    if name in layout.models
]


@pytest.mark.parametrize("name, layout", CASES)
def test_layout_matches_one_process_to_1e_10_in_float64(ranks, folder, one_process, name, layout):
    found = ranks.run(_trajectory, folder, name, layout, world=layout.world)
    wanted = one_process[name]
    drawn = [(key, noise) for answer in found[:: layout.tp] for key, noise in answer["drawn"].items()]
    assert len(drawn) == len(wanted["drawn"]), "a latent is drawn by no rank, or by two"
    assert all(torch.equal(noise, wanted["drawn"][key]) for key, noise in drawn), "noise depends on the layout"
    levels = {key: set().union(*(a["levels"].get(key, set()) for a in found)) for key in wanted["levels"]}
    assert levels == wanted["levels"], "noise level or caption dropout of a sample depends on the layout, or on the rank"
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
