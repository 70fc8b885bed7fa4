"""Packed training is the training of its samples one by one: losses, norms, every gradient and the weights of ten steps, to 1e-10."""

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
from training import events, metrics, overrides, train_here

from opensora_dist.config.load import load_config
from opensora_dist.config.train import (
    IddpmConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RectifiedFlowConfig,
    SpConfig,
    TrainConfig,
    ZeroConfig,
)
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import GlobalBatch
from opensora_dist.models.levers import set_levers
from opensora_dist.models.tensor import share_blocks
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.recipes.build import meta_model
from opensora_dist.recipes.data import order_of
from opensora_dist.recipes.shards import LatentShards
from opensora_dist.train.step import train_step

STEPS, SAMPLES_PER_STEP = 10, 8
# Clips whose frames don't divide, images that are cut into rows, clips of few places; captions of 1 to 6 tokens.
SAMPLES = {(3, 32, 48): 9, (1, 48, 32): 8, (5, 16, 16): 7, (2, 32, 32): 6}
# Samples of each unit of a step, step by step in turn; the first has a unit of one sample.
UNITS = ((3, 1, 2, 2), (2, 2, 2, 2), (1, 4, 1, 2))


@dataclass(frozen=True)
class Layout:
    world: int
    stage: int
    accum: int = 1
    sp: int = 1
    scheme: str = "dsp"
    tp: int = 1
    recompute: str = "none"
    tile: int | None = None
    model: str = "stdit"
    objective: str = "rectified_flow"
    weight: str = "sample"
    slow: bool = False

    def __str__(self):
        shared = f"-sp{self.sp}-{self.scheme}" if self.sp > 1 else ""
        shared += f"-tp{self.tp}" if self.tp > 1 else ""
        again = ("" if self.recompute == "none" else f"-{self.recompute}") + ("-tiles" if self.tile else "")
        what = f"{self.model}-{self.objective}-{self.weight}"
        return f"{what}-dp{self.world // self.sp // self.tp}{shared}-zero{self.stage}-accum{self.accum}{again}"

    @property
    def parallel(self):
        ulysses = self.sp // 2 if self.scheme == "usp" else None
        sp = SpConfig(degree=self.sp, scheme=self.scheme, ulysses=ulysses)
        zero = ZeroConfig(stage=self.stage)
        return ParallelConfig(
            grad_accum=self.accum, sp=sp, tp=self.tp, recompute=self.recompute, tile_tokens=self.tile, zero=zero
        )


_dit = partial(Layout, model="dit", objective="iddpm")
LAYOUTS = [
    Layout(1, 0, accum=2),
    Layout(1, 0, recompute="full", tile=16, slow=True),
    Layout(2, 0, accum=2, recompute="selective"),
    Layout(2, 2, weight="token", objective="iddpm"),
    Layout(2, 3, accum=2, slow=True),
    Layout(4, 3, slow=True),
    Layout(2, 0, sp=2, recompute="selective"),
    Layout(2, 2, sp=2, accum=2, weight="token"),
    Layout(2, 3, sp=2, slow=True),
    Layout(3, 2, sp=3, slow=True),
    Layout(4, 3, sp=2, recompute="selective"),
    Layout(4, 0, sp=2, accum=2, slow=True),
    Layout(4, 2, sp=4, recompute="full", tile=16, slow=True),
    _dit(2, 0, accum=2),
    _dit(2, 2, sp=2, scheme="ulysses", recompute="selective"),
    Layout(2, 0, sp=2, scheme="ring", weight="token"),
    *(Layout(2, 2, sp=2, scheme=name, recompute="selective", slow=True) for name in SCHEMES if name != "dsp"),
    *(_dit(2, 2, sp=2, scheme=name, weight="token", slow=True) for name in SCHEMES if name != "dsp"),
    *(_dit(4, 3, sp=2, scheme=name, slow=True) for name in SCHEMES if name != "dsp"),
    _dit(4, 2, sp=4, scheme="usp", recompute="full", slow=True),
    Layout(2, 2, tp=2, accum=2),
    _dit(2, 3, tp=2, recompute="selective", slow=True),
    Layout(4, 2, tp=2, sp=2, recompute="selective", slow=True),
]
ONE_BY_ONE = Layout(1, 0, accum=SAMPLES_PER_STEP)


class GivenOrder:
    """Steps made by hand, of samples of all shapes; in units of several samples, or the same samples one by one."""

    def __init__(self, index, *, packed):
        self._index, self._packed = index, packed
        self.global_batch = len(UNITS[0]) if packed else SAMPLES_PER_STEP
        self.latents = tuple(sorted({index.latent_shape(row) for row in range(len(index))}))

    def batch(self, step):
        rows = torch.randperm(len(self._index), generator=Keys(5).generator("test:rows", step=step))[:SAMPLES_PER_STEP].tolist()
        sizes = UNITS[step % len(UNITS)] if self._packed else [1] * len(rows)
        ends = list(itertools.accumulate(sizes, initial=0))
        latents = [self._index.latent_shape(row) for row in rows]
        return GlobalBatch(
            units=tuple(tuple(rows[a:b]) for a, b in itertools.pairwise(ends)),
            shapes={latent: latents.count(latent) for latent in latents},
            text_tokens=max(int(self._index.text_tokens[row]) for row in rows),
            epoch=0,
            digest=f"{step}",
        )

    def substitute(self, step, place, attempt):
        batch, index = self.batch(step), self._index
        rows = [
            row
            for row in range(len(index))
            if index.latent_shape(row) == index.latent_shape(batch.rows[place])
            and row not in batch.rows
            and index.text_tokens[row] <= batch.text_tokens
        ]
        number = place + attempt * SAMPLES_PER_STEP
        return rows[number] if number < len(rows) else None


def trajectory(folder, layout, packed):
    parallel = layout.parallel
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=parallel.sp, tp=parallel.tp, timeout_s=60)
    keys, index = Keys(3), Index.open(Path(folder))
    config = ModelConfig(name=layout.model, depth=2, width=24, heads=4, patch=(1, 1, 2), pooled_text=True)
    objective_config = {"rectified_flow": RectifiedFlowConfig, "iddpm": IddpmConfig}[layout.objective](caption_dropout=0.3)
    model, objective = meta_model(config, objective_config, index.spec, dtype=torch.float64)
    set_levers(model, parallel, device=mesh.device, min_offload_bytes=0)
    share_blocks(model, mesh)
    shards = LatentShards(mesh, SequenceParallel(mesh, parallel.sp), model)
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    backend = Spy(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=randomise,
        parallel=parallel,
        optim=optim,
        compute_dtype=torch.float64,
    )
    told, losses, norms, replaced = [], [], [], []
    loader = Loader(
        index,
        GivenOrder(index, packed=packed),
        share=shards.share,
        accum=layout.accum,
        start_step=0,
        num_steps=STEPS,
        loss_weight=layout.weight,
        reader_threads=1,
        prefetch_batches=2,
        dtype=torch.float64,
        device=torch.device("cpu"),
        on_bad=lambda bad: told.append((bad.step, bad.key, bad.substitute)),
    )
    levels, runs = {}, []
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
        loss = result.loss * (mesh.tp_rank == 0)
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(result.grad_norm.item())
        runs += [len(run) for run in data.runs]
        for micro in data.micros:
            replaced += [(data.step, place, key) for place, key in zip(micro.places, micro.keys, strict=True)]
            for sample in micro.samples:
                levels[data.step, sample] = objective.draw_level(keys, sample=sample, step=data.step, latent=micro.latent)
    params = {name: full(t).detach().clone() for name, t in backend.state_dict(ema=backend.weights).items()}
    return {
        "losses": losses,
        "norms": norms,
        "grads": backend.grads,
        "params": params,
        "used": replaced,
        "told": told,
        "levels": levels,
        "runs": runs,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    write_dataset(path, samples=SAMPLES)
    return str(path)


@pytest.fixture(scope="module")
def one_by_one(ranks, folder):
    """One process that runs each sample by itself, for each model, objective and weight that is asked for."""
    found = {}

    def of(layout):
        what = (layout.model, layout.objective, layout.weight)
        if what not in found:
            alone = Layout(1, 0, accum=SAMPLES_PER_STEP, model=what[0], objective=what[1], weight=what[2])
            found[what] = ranks.run(trajectory, folder, alone, False, world=1)[0]
        return found[what]

    return of


def assert_same(found, wanted):
    used = sorted({item for answer in found for item in answer["used"]})
    assert used == sorted(wanted["used"]), "other samples were trained on, or in other places"
    assert wanted["levels"] == {k: v for answer in found for k, v in answer["levels"].items()}
    for answer in found:
        for name in ("losses", "norms"):
            torch.testing.assert_close(answer[name], wanted[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer["params"], wanted["params"], rtol=1e-10, atol=1e-10)
        for step in range(STEPS):
            assert answer["grads"][step].keys() == wanted["grads"][step].keys()
            for name, grad in wanted["grads"][step].items():
                scale = float(grad.abs().max())
                assert scale > 0, f"no gradient reaches {name}: nothing would be compared"
                torch.testing.assert_close(answer["grads"][step][name], grad, rtol=1e-10, atol=1e-10 * scale, msg=name)


@pytest.mark.parametrize("layout", [pytest.param(x, id=str(x), marks=pytest.mark.slow if x.slow else ()) for x in LAYOUTS])
def test_packed_training_is_that_of_each_sample_by_itself_in_one_process(ranks, folder, one_by_one, layout):
    found, wanted = ranks.run(trajectory, folder, layout, True, world=layout.world), one_by_one(layout)
    assert max(found[0]["runs"]) > 2 and set(wanted["runs"]) == {1}, "nothing was packed, or the comparison was"
    assert len({level for (step, _), level in wanted["levels"].items() if step == 0}) == SAMPLES_PER_STEP, "samples share a level"
    assert_same(found, wanted)


@pytest.mark.parametrize("layout", [Layout(2, 2, sp=2), pytest.param(Layout(4, 3, sp=2), marks=pytest.mark.slow)], ids=str)
def test_a_bad_sample_in_a_pack_is_replaced_alike_on_all_ranks_that_share_it(ranks, tmp_path, layout):
    """The last frame is damaged: of two ranks that share the sample only the second one reads it."""
    write_dataset(tmp_path, samples=SAMPLES)
    index = Index.open(tmp_path)
    order = GivenOrder(index, packed=True)
    row = next(row for row in order.batch(0).rows if index.latent_shape(row).t == 3)
    place = index.latents_place(row)
    with index.shard_path(row).open("r+b") as shard:
        shard.seek(place.offset + place.num_bytes - 1)
        byte = shard.read(1)
        shard.seek(-1, 1)
        shard.write(bytes([byte[0] ^ 1]))
    found = ranks.run(trajectory, str(tmp_path), layout, True, world=layout.world)
    (wanted,) = ranks.run(trajectory, str(tmp_path), ONE_BY_ONE, False, world=1)
    assert wanted["told"] and all(key == index.key[row] for _, key, _ in wanted["told"])
    assert not any(answer["told"] for answer in found[::2])
    assert sorted(bad for answer in found[1::2] for bad in answer["told"]) == sorted(wanted["told"])
    assert index.key[row] not in {key for answer in found for _, _, key in answer["used"]}
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["used"] == second["used"]
    assert_same(found, wanted)


def test_what_no_pack_had_room_for_is_counted_in_metrics_and_at_the_end(ranks, tmp_path):
    write_dataset(tmp_path / "data", samples=SAMPLES)
    args = overrides(tmp_path / "data", tmp_path / "run", "data.batching=packed", "data.unit_tokens=40", "run.steps=8")
    ranks.run(train_here, args, world=2)
    config, index = load_config(TrainConfig, None, overrides=args), Index.open(tmp_path / "data")
    model, _ = meta_model(config.model, config.objective, index.spec)
    order = order_of(config.data, index, model, keys=Keys(config.run.seed))
    planned = [len(order.batch(step).left_out) for step in range(8)]
    assert sum(planned) > 0, "everything had room: nothing would be counted"
    assert [m["left_out"] for m in metrics(tmp_path / "run")] == planned
    (end,) = events(tmp_path / "run", "end")
    assert end["left_out"] == sum(planned)
