"""Objectives against formulas written out by hand, and draws that depend on the sample and the step alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from opensora_dist.config.train import IddpmConfig, RectifiedFlowConfig
from opensora_dist.core.types import Region, Thw
from opensora_dist.diffusion.draws import draw
from opensora_dist.diffusion.iddpm import Iddpm, discretized_gaussian_log_likelihood
from opensora_dist.diffusion.rectified_flow import RectifiedFlow, shift_sigma
from opensora_dist.diffusion.registry import build_objective
from opensora_dist.parallel.keys import Keys, sample_id

LATENT = Thw(3, 2, 4)


def flow(**config):
    return RectifiedFlow(RectifiedFlowConfig(**config), spatial_factor=8)


def batch(channels=2, *, batch_size=3, outputs=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch_size, channels, *LATENT)
    x0, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    output = torch.randn((batch_size, outputs * channels, *LATENT), generator=g, dtype=torch.float64)
    return x0, noise, output


def reference_iddpm_loss(output, x0, noise, t):
    """mse + vb of one scalar, straight from the paper, in Python floats."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_bar = np.cumprod(1 - betas)
    bar, previous, beta = alphas_bar[t], (alphas_bar[t - 1] if t else 1.0), betas[t]
    eps, v = output
    xt = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise

    def posterior_mean(start):
        return (math.sqrt(previous) * beta * start + math.sqrt(1 - beta) * (1 - previous) * xt) / (1 - bar)

    low = betas[max(t, 1)] * (1 - alphas_bar[max(t, 1) - 1]) / (1 - alphas_bar[max(t, 1)])
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - (v + 1) / 2) * math.log(low)
    mean = posterior_mean((xt - math.sqrt(1 - bar) * eps) / math.sqrt(bar))
    if t > 0:
        nats = (
            math.log(math.sqrt(math.exp(log_variance)) / math.sqrt(low))
            + (low + (posterior_mean(x0) - mean) ** 2) / (2 * math.exp(log_variance))
            - 0.5
        )
    else:

        def cdf(x):
            z = (x - mean) / math.exp(0.5 * log_variance)
            return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        if x0 < -0.999:
            probability = cdf(x0 + 1 / 255)
        elif x0 > 0.999:
            probability = 1 - cdf(x0 - 1 / 255)
        else:
            probability = cdf(x0 + 1 / 255) - cdf(x0 - 1 / 255)
        nats = -math.log(max(probability, 1e-12))
    return (eps - noise) ** 2 + nats / math.log(2)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_iddpm_loss_is_mse_plus_bound_in_bits(timestep):
    x0, noise, output = batch(outputs=2)
    if timestep == 0:  # near the data, so that the likelihood is not clamped everywhere; both open bins occur
        output[:, :2] = noise + 0.1 * output[:, :2]
        x0[0].clamp_(-0.5, 0.5)
    loss = Iddpm(IddpmConfig()).loss(output, x0=x0, noise=noise, level_B=torch.full((3,), timestep, dtype=torch.float64))
    assert loss.shape == (3, *LATENT)
    for index in np.ndindex(3, *LATENT):
        b, *thw = index
        expected = np.mean(
            [
                reference_iddpm_loss(
                    (float(output[b, c, *thw]), float(output[b, 2 + c, *thw])),
                    float(x0[b, c, *thw]),
                    float(noise[b, c, *thw]),
                    timestep,
                )
                for c in range(2)
            ]
        )
        assert float(loss[index]) == pytest.approx(expected, rel=1e-9)


def test_iddpm_levels_of_a_batch_do_not_mix():
    x0, noise, output = batch(outputs=2)
    objective, levels = Iddpm(IddpmConfig()), torch.tensor([0.0, 17.0, 999.0], dtype=torch.float64)
    whole = objective.loss(output, x0=x0, noise=noise, level_B=levels)
    for i in range(3):
        one = objective.loss(output[i : i + 1], x0=x0[i : i + 1], noise=noise[i : i + 1], level_B=levels[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one, rtol=0, atol=1e-12)


def test_iddpm_bound_teaches_the_variance_only():
    x0, noise, output = batch(outputs=2)
    output.requires_grad_()
    levels = torch.tensor([0.0, 17.0, 999.0], dtype=torch.float64)
    Iddpm(IddpmConfig()).loss(output, x0=x0, noise=noise, level_B=levels).sum().backward()
    mse_only = 2 * (output.detach()[:, :2] - noise) / 2  # the mean over two channels
    torch.testing.assert_close(output.grad[:, :2], mse_only)
    assert output.grad[1:, 2:].abs().min() > 0


def test_discretized_likelihood_sums_to_one_over_the_bins():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in [(0.1, -2.0), (-0.9, -1.0), (0.99, -4.0)]:
        means, log_scales = torch.full_like(x, mean), torch.full_like(x, log_scale)
        log_probability = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
        assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_iddpm_corrupts_by_the_linear_schedule():
    x0, noise, _ = batch()
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    levels = torch.tensor([0.0, 400.0, 999.0], dtype=torch.float64)
    got = Iddpm(IddpmConfig()).corrupt(x0, noise, levels)
    for i, t in enumerate((0, 400, 999)):
        expected = math.sqrt(alphas_bar[t]) * x0[i] + math.sqrt(1 - alphas_bar[t]) * noise[i]
        torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=1e-12)


def test_iddpm_timesteps_are_uniform_over_the_schedule():
    objective, keys = Iddpm(IddpmConfig(timesteps=50)), Keys(3)
    draws = [objective.draw_level(keys, sample=s, step=0, latent=LATENT) for s in range(2000)]
    assert set(draws) == set(range(50))
    assert np.mean(draws) == pytest.approx(24.5, abs=1.0)


def test_the_shortest_schedule_that_a_config_may_ask_for_has_betas_below_1():
    with pytest.raises(ValidationError, match="greater than or equal to 21"):
        IddpmConfig(timesteps=20)
    assert (Iddpm(IddpmConfig(timesteps=21)).betas < 1).all()


def test_rectified_flow_goes_straight_and_predicts_data_minus_noise():
    x0, noise, output = batch()
    levels = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    objective = flow()
    xt = objective.corrupt(x0, noise, levels)
    torch.testing.assert_close(xt[0], 0.75 * x0[0] + 0.25 * noise[0])
    loss = objective.loss(output, x0=x0, noise=noise, level_B=levels)
    torch.testing.assert_close(loss, ((output - x0 + noise) ** 2).mean(1))
    assert objective.loss(x0 - noise, x0=x0, noise=noise, level_B=levels).abs().max() == 0
    assert objective.timestep(levels).tolist() == [250, 500, 900]


@pytest.mark.parametrize(
    "objective, levels",
    [(Iddpm(IddpmConfig()), (1.0, 300.0, 900.0)), (flow(), (0.25, 0.5, 0.75))],
    ids=["iddpm", "rectified_flow"],
)
def test_float32_data_stays_float32_and_agrees_with_float64(objective, levels):
    x0, noise, output = batch(outputs=objective.channel_multiplier)
    levels = torch.tensor(levels, dtype=torch.float64)
    exact = objective.loss(output, x0=x0, noise=noise, level_B=levels)
    single = objective.loss(output.float(), x0=x0.float(), noise=noise.float(), level_B=levels)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-3, atol=1e-5)


def test_shift_ratios_are_those_of_the_published_recipes():
    latent = Thw(16, 64, 32)  # 512 x 256 pixels
    assert flow(shift="none").shift_ratio(latent) == 1
    assert flow(shift="constant", shift_value=2.5).shift_ratio(latent) == 2.5
    assert flow(shift="resolution_frames").shift_ratio(latent) == pytest.approx(math.sqrt(0.5) * 4)
    assert flow(shift="resolution_frames").shift_ratio(Thw(1, 64, 64)) == pytest.approx(1)
    line = flow(shift="token_line")
    assert line.shift_ratio(Thw(5, 32, 32)) == pytest.approx(1)  # 256 tokens of 2 x 2
    assert line.shift_ratio(Thw(5, 128, 128)) == pytest.approx(3)  # 4096 tokens
    assert line.shift_ratio(Thw(1, 64, 136)) == pytest.approx(2)  # 2176 tokens: the middle
    assert line.shift_ratio(Thw(1, 8, 8)) == 1
    assert line.shift_ratio(Thw(1, 256, 256)) == 3


def test_shift_moves_sigma_as_written():
    assert shift_sigma(0.5, 3.0) == pytest.approx(0.75)
    assert shift_sigma(0.2, 1.0) == 0.2
    assert (shift_sigma(0.0, 7.0), shift_sigma(1.0, 7.0)) == (0, 1)


def test_sigmas_are_logit_normal_then_shifted():
    keys = Keys(0)
    plain, shifted = flow(logit_mean=0.5, logit_std=0.7), flow(logit_mean=0.5, logit_std=0.7, shift="constant", shift_value=3)
    draws = [plain.draw_level(keys, sample=s, step=4, latent=LATENT) for s in range(3000)]
    logits = np.log(draws) - np.log1p(-np.asarray(draws))
    assert np.mean(logits) == pytest.approx(0.5, abs=0.05)
    assert np.std(logits) == pytest.approx(0.7, abs=0.05)
    assert shifted.draw_level(keys, sample=9, step=4, latent=LATENT) == pytest.approx(shift_sigma(draws[9], 3.0))


@pytest.mark.parametrize("config", [IddpmConfig(), RectifiedFlowConfig(shift="resolution_frames")], ids=lambda c: c.name)
def test_draws_are_identical_however_samples_are_batched(config):
    keys, objective = Keys(5), build_objective(config, spatial_factor=8)
    samples = [sample_id(f"clip-{i}") for i in range(6)]

    def drawn(part):
        return draw(keys, objective, samples=part, step=11, channels=3, latent=LATENT, region=None)

    whole = drawn(samples)
    for size in (1, 2, 3):
        parts = [drawn(samples[i : i + size]) for i in range(0, 6, size)]
        for name in ("noise_BCthw", "level_B", "drop_caption_B"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert whole.noise_BCthw.dtype == torch.float32
    assert whole.level_B.dtype == torch.float64
    assert len(set(whole.level_B.tolist())) == 6
    other = draw(keys, objective, samples=samples, step=12, channels=3, latent=LATENT, region=None)
    assert not torch.equal(other.level_B, whole.level_B)
    assert not torch.equal(other.noise_BCthw, whole.noise_BCthw)


@pytest.mark.parametrize(
    "region",
    [Region(1, 3, 0, LATENT.h), Region(2, 3, 0, LATENT.h), Region(0, LATENT.t, 1, 2)],
    ids=["frames", "one frame", "rows"],
)
def test_a_rank_that_holds_a_region_draws_its_noise_bitwise_and_the_whole_samples_level_and_dropout(region):
    keys, objective, samples = Keys(5), flow(shift="resolution_frames", caption_dropout=0.5), list(range(3, 9))
    whole = draw(keys, objective, samples=samples, step=1, channels=3, latent=LATENT, region=None)
    part = draw(keys, objective, samples=samples, step=1, channels=3, latent=LATENT, region=region)
    assert torch.equal(part.noise_BCthw, whole.noise_BCthw[:, :, region.t0 : region.t1, region.h0 : region.h1])
    assert torch.equal(part.level_B, whole.level_B)
    assert torch.equal(part.drop_caption_B, whole.drop_caption_B) and 0 < part.drop_caption_B.sum() < len(samples)


@pytest.mark.parametrize("config", [IddpmConfig(), RectifiedFlowConfig(shift="resolution_frames")], ids=lambda c: c.name)
def test_what_an_objective_makes_of_a_region_is_bitwise_that_region_of_the_whole(config):
    objective, generator = build_objective(config, spatial_factor=8), Keys(1).generator("region")
    x0, noise = (torch.empty(2, 3, *LATENT, dtype=torch.float64).normal_(generator=generator) for _ in range(2))
    output = torch.empty(2, 3 * objective.channel_multiplier, *LATENT, dtype=torch.float64).normal_(generator=generator)
    level_B = torch.tensor([0.0, 417.0 if config.name == "iddpm" else 0.4], dtype=torch.float64)
    for region in (Region(1, 3, 0, LATENT.h), Region(0, LATENT.t, 1, 2)):

        def cut(tensor, region=region):
            return tensor[..., region.t0 : region.t1, region.h0 : region.h1, :]

        assert torch.equal(objective.corrupt(cut(x0), cut(noise), level_B), cut(objective.corrupt(x0, noise, level_B)))
        part = objective.loss(cut(output), x0=cut(x0), noise=cut(noise), level_B=level_B)
        assert torch.equal(part, cut(objective.loss(output, x0=x0, noise=noise, level_B=level_B)))


def test_caption_dropout_has_its_probability():
    objective = flow(caption_dropout=0.25)
    drops = draw(Keys(0), objective, samples=range(2000), step=0, channels=1, latent=Thw(1, 1, 1), region=None).drop_caption_B
    assert drops.float().mean().item() == pytest.approx(0.25, abs=0.04)
    never = draw(Keys(0), flow(caption_dropout=0.0), samples=range(50), step=0, channels=1, latent=Thw(1, 1, 1), region=None)
    always = draw(Keys(0), flow(caption_dropout=1.0), samples=range(50), step=0, channels=1, latent=Thw(1, 1, 1), region=None)
    assert not never.drop_caption_B.any()
    assert always.drop_caption_B.all()
