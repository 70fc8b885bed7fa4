"""Ranks that share videos draw what one process draws: noise, every step, guidance, and the one gather at the end."""

from __future__ import annotations

import pytest
import torch
from dataset_factory import SPEC

from opensora_dist.codecs.registry import build_text_encoder
from opensora_dist.config.train import IddpmConfig, ModelConfig, RectifiedFlowConfig, SpConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.recipes.build import meta_model
from opensora_dist.train.generate import SamplingOptions, gather_region, generate_latents, noise_ids

CPU = torch.device("cpu")
PROMPTS = ["red", "a blue square moves left"]
# Frames that don't divide, frames of which two make a token, and too few frames, so that rows are shared, which don't divide either.
LATENTS = {Thw(5, 4, 6): (1, 2, 2), Thw(6, 2, 2): (2, 1, 2), Thw(1, 10, 4): (1, 2, 1)}
CASES = {
    "flow": (RectifiedFlowConfig(shift="resolution_frames"), None),
    "flow_dpm": (RectifiedFlowConfig(), "dpm_solver"),
    "dpm": (IddpmConfig(), "dpm_solver"),
    "ddpm": (IddpmConfig(), "ddpm"),
}


def _model(objective, patch):
    model, built = meta_model(ModelConfig(depth=2, width=16, heads=2, patch=patch), objective, SPEC, dtype=torch.float64)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.1, generator=Keys(1).generator(f"test:{name}"))
    return model.eval(), built


def _draw(case, size):
    """What one process and ``size`` ranks draw, by latent shape, and the largest shape a model was shown by the ranks."""
    objective, sampler = CASES[case]
    sp = SpConfig(degree=size)
    mesh = build_mesh(CPU, dp_replicate=1, sp=sp, timeout_s=60)
    texts = [t.double() for t in build_text_encoder(SPEC.text, device=CPU).encode(PROMPTS)]
    answers = {}
    for latent, patch in LATENTS.items():
        model, built = _model(objective, patch)
        shard = SequenceParallel(mesh, sp).shard(model.token_grid(latent))
        shown = []
        model.register_forward_pre_hook(lambda _module, given, shown=shown: shown.append(tuple(given[0].shape)))

        def draw(shard, latent=latent, model=model, built=built):
            with torch.no_grad():
                return generate_latents(
                    model,
                    noise_ids=noise_ids(PROMPTS),
                    texts=texts,
                    latent=latent,
                    spec=SPEC,
                    objective=built,
                    options=SamplingOptions(sampler=sampler, steps=3, cfg_scale=2.0),
                    keys=Keys(0),
                    device=CPU,
                    shard=shard,
                )

        one = draw(None)
        shown.clear()
        parts = draw(shard)
        region = shard.region.times(Thw(*patch))
        assert set(shown) == {(2 * len(PROMPTS), SPEC.channels, *region.shape(latent))}
        answers[latent] = (one, parts)
    return answers


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_videos_draw_those_of_one_process_from_their_own_regions(ranks, case, size):
    for answers in ranks.run(_draw, case, size, world=size):
        for latent, (one, parts) in answers.items():
            assert parts.shape == (len(PROMPTS), SPEC.channels, *latent)
            assert one.std() > 0.3
            torch.testing.assert_close(parts, one, rtol=1e-10, atol=1e-10)


def _gathered(size):
    sp = SpConfig(degree=size)
    mesh = build_mesh(CPU, dp_replicate=1, sp=sp, timeout_s=60)
    for grid, patch in ((Thw(7, 2, 3), Thw(2, 1, 2)), (Thw(1, 5, 2), Thw(1, 3, 1))):
        shard = SequenceParallel(mesh, sp).shard(grid)
        latent = Thw(*(n * p for n, p in zip(grid, patch)))
        whole = torch.arange(2 * 3 * latent.volume, dtype=torch.float64).view(2, 3, *latent)
        r = shard.region.times(patch)
        assert torch.equal(gather_region(whole[:, :, r.t0 : r.t1, r.h0 : r.h1], shard=shard), whole)


@pytest.mark.parametrize("size", [2, 4])
def test_regions_of_unequal_size_make_the_whole_on_every_rank(ranks, size):
    ranks.run(_gathered, size, world=size)
