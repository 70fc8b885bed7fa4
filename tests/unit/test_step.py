"""The loss of a micro-batch is a sum over positions, and ranks agree on it before each forward."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opensora_dist.config.train import IddpmConfig, RectifiedFlowConfig
from opensora_dist.core.types import Region, Thw
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.diffusion.registry import build_objective
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.local import whole
from opensora_dist.train.step import TiledLoss, micro_loss, train_step

LATENT = Thw(5, 4, 3)
CHANNELS = 2


class _Pointwise(nn.Module):
    """Its output at a position depends on its input there alone, so that parts can be told from the whole without a scheme."""

    def __init__(self, out_channels):
        super().__init__()
        self.mix = nn.Parameter(
            torch.empty(out_channels, CHANNELS, dtype=torch.float64).normal_(generator=Keys(0).generator("mix"))
        )
        self.calls = []

    def forward(self, x_BCthw, timestep_B, text_BYE, text_mask_BY, *, drop_caption_B, shard):
        self.calls.append(shard)
        scale = timestep_B / 1000 + text_BYE.sum(dim=(1, 2)) * ~drop_caption_B
        return torch.einsum("oc,bcthw->bothw", self.mix, x_BCthw) * scale.view(-1, 1, 1, 1, 1)


def _micro(region, number=0):
    generator = Keys(number).generator("micro")
    latents = torch.empty(2, CHANNELS, *LATENT, dtype=torch.float64).normal_(generator=generator)
    return MicroBatch(
        latents_BCthw=latents[:, :, region.t0 : region.t1, region.h0 : region.h1],
        latent=LATENT,
        region=region,
        text_BYE=torch.empty(2, 3, 4, dtype=torch.float64).normal_(generator=generator),
        text_mask_BY=torch.ones(2, 3, dtype=torch.bool),
        samples=(7 + number, 9 + number),
        keys=("a", "b"),
        weight_B=torch.tensor([0.001, 0.002], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    "config", [IddpmConfig(caption_dropout=0.5), RectifiedFlowConfig(shift="resolution_frames")], ids=lambda c: c.name
)
@pytest.mark.parametrize(
    "regions",
    [[Region(0, 2, 0, 4), Region(2, 4, 0, 4), Region(4, 5, 0, 4)], [Region(0, 5, 0, 3), Region(0, 5, 3, 4)]],
    ids=["frames", "rows"],
)
def test_the_losses_and_gradients_of_all_regions_sum_to_those_of_the_whole(config, regions):
    objective = build_objective(config, spatial_factor=8)
    model = _Pointwise(CHANNELS * objective.channel_multiplier)

    def loss_and_gradient(region):
        model.zero_grad()
        loss = micro_loss(model, [_micro(region)], objective=objective, keys=Keys(3), step=4, shards=[None])
        loss.backward()
        return loss.item(), model.mix.grad.clone()

    loss, gradient = loss_and_gradient(Region.whole(LATENT))
    losses, gradients = zip(*map(loss_and_gradient, regions), strict=True)
    assert loss > 0 and min(losses) > 0
    assert sum(losses) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sum(gradients), gradient, rtol=1e-12, atol=1e-14)


def _step(micros):
    return StepData(
        step=0, epoch=0, digest="", micros=micros, substitute=lambda *_: pytest.fail("nothing is bad"), shapes={LATENT: 2}
    )


@pytest.mark.parametrize("positions", [1, 7, 1000])
@pytest.mark.parametrize("config", [IddpmConfig(), RectifiedFlowConfig()], ids=lambda c: c.name)
def test_a_loss_over_tiles_of_positions_is_the_same_sum_with_the_same_gradient(config, positions):
    objective = build_objective(config, spatial_factor=8)
    model, found = _Pointwise(CHANNELS * objective.channel_multiplier), []
    for of in (objective, TiledLoss(of=objective, positions=positions)):
        model.zero_grad()
        loss = micro_loss(model, [_micro(Region(0, 4, 0, 3))], objective=of, keys=Keys(3), step=4, shards=[None])
        loss.backward()
        found.append((loss.item(), model.mix.grad.clone()))
    (wanted, wanted_gradient), (tiled, gradient) = found
    assert tiled == pytest.approx(wanted, rel=1e-12) and wanted > 0
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-14)


def _backend(model, *, backward):
    return SimpleNamespace(
        model=model,
        forward_context=lambda *, last_micro: nullcontext(),
        backward=backward,
        clip=lambda _norm: torch.zeros(()),
        step=lambda *, lr: None,
        skipped=lambda: torch.zeros(()),
    )


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one_is_built():
    objective = build_objective(RectifiedFlowConfig(), spatial_factor=8)
    model, graphs, alive = _Pointwise(CHANNELS), [], []

    def backward(loss):
        graphs.append(weakref.ref(loss))
        loss.backward()

    train_step(
        _backend(model, backward=backward),
        _step([_micro(Region.whole(LATENT), number) for number in range(3)]),
        objective=objective,
        keys=Keys(0),
        shards=lambda _latent: whole(Thw(5, 2, 3)),
        agree=lambda parts: alive.append([graph() is not None for graph in graphs]) or parts,
        lr=1.0,
        clip_norm=1.0,
    )
    assert alive == [[], [False], [False, False]]


def test_ranks_agree_once_before_each_forward_which_is_told_the_shard_of_the_samples():
    objective = build_objective(RectifiedFlowConfig(), spatial_factor=8)
    model = _Pointwise(CHANNELS)
    micros, done = [_micro(Region.whole(LATENT), number) for number in range(3)], []
    model.register_forward_pre_hook(lambda *_: done.append("forward"))
    backend = _backend(model, backward=lambda loss: loss.backward())
    shard, asked = whole(Thw(5, 2, 3)), []
    train_step(
        backend,
        _step(list(micros)),
        objective=objective,
        keys=Keys(0),
        shards=lambda latent: asked.append(latent) or shard,
        agree=lambda parts: done.extend(parts) or parts,
        lr=1.0,
        clip_norm=1.0,
    )
    assert done == [micros[0], "forward", micros[1], "forward", micros[2], "forward"]
    assert model.calls == [shard] * 3 and set(asked) == {LATENT}
