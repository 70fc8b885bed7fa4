from __future__ import annotations

import pytest
import torch
from dataset_factory import SPEC

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.train import IddpmConfig, ModelConfig, RectifiedFlowConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys
from opensora_dist.recipes.build import meta_model
from opensora_dist.train.generate import SamplingOptions, generate_latents, noise_ids, pad_texts, to_frames

CPU = torch.device("cpu")
PROMPTS = ["red", "a blue square moves left", "green circle", "red"]
LATENT = Thw(3, 4, 6)


def _model(objective_config):
    config = ModelConfig(depth=2, width=16, heads=2)
    model, objective = meta_model(config, objective_config, SPEC, dtype=torch.float64)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.2, generator=Keys(1).generator(f"test:{name}"))
    return model.eval(), objective


def _draw(model, objective, picks, sampler=None):
    ids, texts = noise_ids(PROMPTS), build_text_encoder(SPEC.text, device=CPU).encode(PROMPTS)
    with torch.no_grad():
        return generate_latents(
            model,
            noise_ids=[ids[i] for i in picks],
            texts=[texts[i].double() for i in picks],
            latent=LATENT,
            spec=SPEC,
            objective=objective,
            options=SamplingOptions(sampler=sampler, steps=3, cfg_scale=2.0),
            keys=Keys(0),
            device=CPU,
            shard=None,
        )


def test_noise_belongs_to_a_prompt_and_how_often_it_came_before():
    ids = noise_ids(PROMPTS)
    assert len(set(ids)) == len(PROMPTS)
    assert noise_ids(["x", "red", "red"])[1:] == [ids[0], ids[3]]


def test_texts_of_unequal_length_are_padded_and_masked():
    text_BYE, mask_BY = pad_texts([torch.ones(2, 4), torch.full((3, 4), 2.0)])
    assert text_BYE.shape == (2, 3, 4) and text_BYE[0, 2].abs().sum() == 0
    assert mask_BY.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    "objective, sampler",
    [(RectifiedFlowConfig(), None), (IddpmConfig(), "ddpm"), (IddpmConfig(), "dpm_solver")],
    ids=["flow", "ddpm", "dpm"],
)
def test_what_else_is_in_the_batch_does_not_change_a_video(objective, sampler):
    model, built = _model(objective)
    together = _draw(model, built, range(4), sampler)
    assert not torch.allclose(together[0], together[3]), "a prompt given twice gives two videos"
    for picks in ([0], [2, 0, 1], [3, 1]):
        torch.testing.assert_close(_draw(model, built, picks, sampler), together[picks], rtol=1e-9, atol=1e-9)


def test_latents_are_denormalised_before_they_are_decoded():
    codec = build_codec(SPEC.codec, device=CPU)
    raw = torch.linspace(-3, 3, 4 * 3 * 4 * 6).view(1, 4, 3, 4, 6)
    std, mean = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (SPEC.latent_std, SPEC.latent_mean))
    frames = to_frames((raw - mean) / std, spec=SPEC, codec=codec)
    assert len(frames) == 1 and frames[0].shape == (3, 32, 48, 3)
    assert abs(frames[0].astype(int) - codec.decode(raw)[0].numpy().astype(int)).max() <= 1
