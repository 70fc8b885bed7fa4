"""Samplers against models whose best output is known in closed form: data that is Gaussian, with its own mean and std."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from opensora_dist.config.train import IddpmConfig, RectifiedFlowConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.diffusion.iddpm import Iddpm
from opensora_dist.diffusion.rectified_flow import RectifiedFlow
from opensora_dist.diffusion.samplers import check_sampling, default_sampler, guide, sample_latents, samplers_of

MEAN, STD = 1.5, 0.4
LATENT = Thw(4, 20, 25)


def noise(batch=2, channels=2, latent=LATENT, seed=0):
    return torch.empty((batch, channels, *latent)).normal_(generator=torch.Generator().manual_seed(seed))


def iddpm_oracle(objective, *, variance=0.0):
    """E[noise | x_t] for Gaussian data: x_t ~ N(a MEAN, a^2 STD^2 + s^2), corr with the noise s."""
    alphas_bar = torch.cumprod(1 - objective.betas, dim=0)

    def model(x, timestep, drop):
        bar = alphas_bar[timestep.long()].view(-1, 1, 1, 1, 1)
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)
        return torch.cat([eps.to(x.dtype), torch.full_like(x, variance)], dim=1)

    return model


def flow_oracle(x, timestep, drop):
    """E[x0 - noise | x_t] for Gaussian data."""
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1).to(x.dtype)
    gain = ((1 - sigma) * STD**2 - sigma) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return MEAN + gain * (x - (1 - sigma) * MEAN)


IDDPM = Iddpm(IddpmConfig())


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("sampler, steps, tolerance", [("ddim", 300, 0.02), ("dpm_solver", 40, 0.02), ("ddpm", 300, 0.02)])
def test_iddpm_samplers_reproduce_mean_and_std_of_gaussian_data(sampler, steps, tolerance):
    # Gaussian data's true reverse variance lies between the two bounds; near the upper one with many steps.
    latents = sample_latents(
        iddpm_oracle(IDDPM, variance=0.5),
        objective=IDDPM,
        sampler=sampler,
        steps=steps,
        cfg_scale=1.0,
        noise_BCthW=noise(),
        latent=LATENT,
        generators=generators(len(noise())),
    )
    assert latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert latents.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("shift", ["none", "resolution_frames"])
@pytest.mark.parametrize("sampler, steps", [("flow_euler", 200), ("dpm_solver", 40)])
def test_flow_samplers_reproduce_mean_and_std_of_gaussian_data(sampler, steps, shift):
    objective = RectifiedFlow(RectifiedFlowConfig(shift=shift), spatial_factor=32)
    latents = sample_latents(
        flow_oracle, objective=objective, sampler=sampler, steps=steps, cfg_scale=1.0, noise_BCthW=noise(), latent=LATENT
    )
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert latents.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("steps", [7, 30, 600])
def test_ddim_leaves_no_noise_where_steps_do_not_divide_the_schedule(steps):
    """A model that knows the one clip of its data must end on it exactly."""
    target = noise(seed=9)
    alphas_bar = torch.cumprod(1 - IDDPM.betas, dim=0)

    def model(x, timestep, drop):
        bar = alphas_bar[timestep.long()].view(-1, 1, 1, 1, 1).float()
        return torch.cat([(x - bar.sqrt() * target) / (1 - bar).sqrt(), x], dim=1)

    seen = []

    def recording(x, timestep, drop):
        bar = float(alphas_bar[int(timestep[0])])
        seen.append((x - bar**0.5 * target).std().item() / (1 - bar) ** 0.5)
        return model(x, timestep, drop)

    latents = sample_latents(
        recording, objective=IDDPM, sampler="ddim", steps=steps, cfg_scale=1.0, noise_BCthW=noise(), latent=LATENT
    )
    torch.testing.assert_close(latents, target, atol=1e-3, rtol=0)
    assert all(s == pytest.approx(1, abs=0.02) for s in seen)  # at every step the noise is what the timestep says


def test_ddim_is_that_of_diffusers_where_steps_divide_the_schedule():
    model, start = iddpm_oracle(IDDPM), noise()
    ours = sample_latents(model, objective=IDDPM, sampler="ddim", steps=20, cfg_scale=1.0, noise_BCthW=start, latent=LATENT)
    scheduler = DDIMScheduler(trained_betas=IDDPM.betas.numpy(), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(2), None)[:, :2], t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_flow_euler_is_the_sum_of_velocity_times_sigma_steps():
    objective = RectifiedFlow(RectifiedFlowConfig(shift="constant", shift_value=3.0), spatial_factor=8)
    times = []

    def model(x, timestep, drop):
        times.append(timestep.tolist())
        return 2 * x

    start = noise()
    latents = sample_latents(model, objective=objective, sampler=None, steps=4, cfg_scale=1.0, noise_BCthW=start, latent=LATENT)
    sigmas = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)] + [0]
    expected = start
    for now, after in itertools.pairwise(sigmas):
        expected = expected + (now - after) * 2 * expected
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(torch.tensor(times), torch.tensor([[1000 * s] * 2 for s in sigmas[:-1]]))


def test_flow_dpm_solver_is_told_shifted_levels_unrounded():
    objective = RectifiedFlow(RectifiedFlowConfig(shift="constant", shift_value=3.0), spatial_factor=8)
    times = []

    def model(x, timestep, drop):
        times.append(timestep[0].item())
        return x

    sample_latents(model, objective=objective, sampler="dpm_solver", steps=3, cfg_scale=1.0, noise_BCthW=noise(), latent=LATENT)
    assert times == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (0.999, 0.666, 0.333)], rel=1e-6)


@pytest.mark.parametrize("guided, channels", [(None, 4), (3, 3)])
def test_guidance_extrapolates_from_the_uncaptioned_output_in_one_doubled_batch(guided, channels):
    x, calls = noise(channels=4, latent=Thw(1, 2, 2)), []

    def model(x, timestep, drop):
        calls.append((x, timestep, drop))
        base = torch.cat([x, 10 * x], dim=1)
        return torch.where(drop.view(-1, 1, 1, 1, 1), base, base + 1 + base**2)

    timestep = torch.tensor([3.0, 5.0])
    output = guide(model, x, timestep, cfg_scale=4.0, guided_channels=guided)
    assert len(calls) == 1
    seen, times, drop = calls[0]
    assert torch.equal(seen, torch.cat([x, x]))
    assert times.tolist() == [3, 5, 3, 5]
    assert drop.tolist() == [False, False, True, True]
    uncond = torch.cat([x, 10 * x], dim=1)
    cond = uncond + 1 + uncond**2
    torch.testing.assert_close(output[:, :channels], (uncond + 4 * (cond - uncond))[:, :channels])
    assert torch.equal(output[:, channels:], cond[:, channels:])  # the variance, and unguided latents, are the captioned ones


def test_cfg_scale_one_asks_the_model_once_per_step_with_captions():
    calls = []

    def model(x, timestep, drop):
        calls.append((len(x), drop.any().item()))
        return x

    objective = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
    sample_latents(model, objective=objective, sampler=None, steps=3, cfg_scale=1.0, noise_BCthW=noise(), latent=LATENT)
    assert calls == [(2, False)] * 3


@pytest.mark.parametrize("steps", [12, 61, 434])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_sampling_starts_at_the_last_timestep_and_runs_each_step_once(sampler, steps):
    times = []

    def model(x, timestep, drop):
        times.append(timestep[0].item())
        return torch.cat([x, x], dim=1)

    sample_latents(
        model,
        objective=IDDPM,
        sampler=sampler,
        steps=steps,
        cfg_scale=1.0,
        noise_BCthW=noise(),
        latent=LATENT,
        generators=generators(len(noise())),
    )
    assert len(set(times)) == len(times) == steps
    assert times[0] == 999
    assert times == sorted(times, reverse=True)
    assert sampler != "ddpm" or times[-1] == 0


def test_float64_noise_gives_float64_latents():
    objective = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
    for sampler in samplers_of("rectified_flow"):
        latents = sample_latents(
            flow_oracle, objective=objective, sampler=sampler, steps=3, cfg_scale=1.0, noise_BCthW=noise().double(), latent=LATENT
        )
        assert latents.dtype == torch.float64


def sample_wrongly(objective, **changes):
    arguments = {"sampler": None, "steps": 5, "cfg_scale": 1.0, "noise_BCthW": noise(), "latent": LATENT} | changes
    return sample_latents(lambda x, timestep, drop: x, objective=objective, **arguments)


def test_samplers_that_cannot_invert_an_objective_are_refused_with_those_that_can():
    flow = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
    with pytest.raises(ConfigError, match=r"sampler=ddpm does not work .*rectified_flow; use one of: flow_euler, dpm_solver"):
        sample_wrongly(flow, sampler="ddpm")
    with pytest.raises(ConfigError, match=r"sampler=flow_euler does not work .*iddpm; use one of: dpm_solver, ddim, ddpm"):
        sample_wrongly(IDDPM, sampler="flow_euler")
    with pytest.raises(ConfigError, match=r"sampling_steps=1001 exceeds objective.timesteps=1000"):
        sample_wrongly(IDDPM, steps=1001)
    with pytest.raises(ConfigError, match=r"sampling_steps=0 must be at least 1"):
        sample_wrongly(flow, steps=0)
    with pytest.raises(ConfigError, match=r"sampling_steps=1 with sampler=ddpm"):
        sample_wrongly(IDDPM, sampler="ddpm", steps=1, generators=generators(len(noise())))
    with pytest.raises(ConfigError, match=r"guided_channels=3 must be between 1 and the 2 latent channels"):
        sample_wrongly(flow, guided_channels=3)


@pytest.mark.parametrize(
    "sampler, steps, said",
    [
        ("flow_euler", 5, "does not work"),
        (None, 0, "at least 1"),
        (None, 51, "exceeds"),
        ("ddpm", 1, "at least 2"),
        (None, 1, None),
    ],
)
def test_a_config_is_told_what_its_objective_would_be(sampler, steps, said):
    config = IddpmConfig(timesteps=50)
    for objective in (config, Iddpm(config)):
        if said is None:
            check_sampling(objective, sampler=sampler, steps=steps)
        else:
            with pytest.raises(ConfigError, match=said):
                check_sampling(objective, sampler=sampler, steps=steps)


def test_default_samplers_are_those_the_config_documents():
    assert (default_sampler("rectified_flow"), default_sampler("iddpm")) == ("flow_euler", "dpm_solver")
