"""From noise to latents: diffusers' schedulers, set up so that they invert our objectives, and classifier-free guidance.

diffusers is imported on use: it takes a second, which every rank of a training would wait for at each start.
"""

# B batch, C latent channels, T H W latent frames, height, width; t, h: those of the region that this rank holds

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opensora_dist.config.train import IddpmConfig, ObjectiveConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Region, Thw
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.iddpm import Iddpm
from opensora_dist.diffusion.rectified_flow import TIMESTEP_SCALE, RectifiedFlow, shift_sigma


class ModelFn(Protocol):
    """A denoiser with its captions already bound.

    ``drop_caption_B`` is True where the null caption is to be used. With guidance the batch is doubled, so the captions of B
    samples must be repeated when ``x_BCthW`` has 2B entries.
    """

    def __call__(self, x_BCthW: Tensor, timestep_B: Tensor, drop_caption_B: Tensor) -> Tensor:
        """The model's raw output, [B, channel_multiplier * C, t, h, W]."""
        ...


Advance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""One step of a scheduler: from the model's output, the scheduler's timestep and the noisy latents to less noisy ones."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A scheduler ready to step, the level of each step, and what of the model's output [B, *, t, h, W] the scheduler takes."""

    scheduler: Any
    levels: list[float]
    to_scheduler: Callable[[Tensor], Tensor]


def _noise_channels(output: Tensor) -> Tensor:
    return output.chunk(2, dim=1)[0]


def _ddpm(objective: Iddpm, steps: int, latent: Thw) -> _Plan:
    """Ancestral sampling with the learned variance; timesteps spread from last to first, as improved diffusion respaces."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        num_train_timesteps=objective.timesteps,
        trained_betas=objective.betas.numpy(),
        variance_type="learned_range",
        clip_sample=False,
    )
    # diffusers adds noise after every timestep but 0, so the last one must be 0.
    scheduler.set_timesteps(timesteps=np.linspace(objective.timesteps - 1, 0, steps).round().astype(int).tolist())
    return _Plan(scheduler=scheduler, levels=scheduler.timesteps.tolist(), to_scheduler=lambda output: output)


def _iddpm_solver(objective: Iddpm, steps: int, *, order: int) -> _Plan:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=objective.timesteps,
        trained_betas=objective.betas.numpy(),
        solver_order=order,
    )
    # The scheduler's own trailing spacing, which these are, has a step too many for one in sixteen values of ``steps``.
    trailing = np.linspace(objective.timesteps, 0, steps + 1)[:-1].round().astype(int) - 1
    scheduler.set_timesteps(timesteps=trailing.tolist())
    # The solver's own learned variance option cuts to 3 channels; it needs the noise only, so we hand it just that.
    return _Plan(scheduler=scheduler, levels=scheduler.timesteps.tolist(), to_scheduler=_noise_channels)


def _ddim(objective: Iddpm, steps: int, latent: Thw) -> _Plan:
    """DDIM with eta 0, which is DPM-Solver++ of order 1 (arXiv 2211.01095, section 4).

    diffusers' own DDIM scheduler steps to t - timesteps // steps rather than to the next timestep, and so leaves noise wherever
    steps does not divide timesteps.
    """
    return _iddpm_solver(objective, steps, order=1)


def _dpm_solver(objective: Iddpm, steps: int, latent: Thw) -> _Plan:
    """DPM-Solver++ of order 2."""
    return _iddpm_solver(objective, steps, order=2)


def _flow_dpm_solver(objective: RectifiedFlow, steps: int, latent: Thw) -> _Plan:
    """DPM-Solver++ of order 2 on the straight path; it starts at sigma 0.999, as log-SNR is infinite at 1."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=objective.shift_ratio(latent)
    )
    scheduler.set_timesteps(steps)
    # Levels from the sigmas: the scheduler's timesteps are rounded to integers.
    return _Plan(scheduler=scheduler, levels=scheduler.sigmas[:-1].tolist(), to_scheduler=torch.neg)


def _flow_euler(objective: RectifiedFlow, steps: int, latent: Thw) -> _Plan:
    """Euler steps from sigma 1 to 0, even before the shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    ratio = objective.shift_ratio(latent)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(TIMESTEP_SCALE))
    scheduler.set_timesteps(sigmas=[shift_sigma(1 - i / steps, ratio) for i in range(steps)])
    # diffusers' velocity points from data to noise, ours from noise to data.
    return _Plan(scheduler=scheduler, levels=scheduler.sigmas[:-1].tolist(), to_scheduler=torch.neg)


_IDDPM_SAMPLERS = {"dpm_solver": _dpm_solver, "ddim": _ddim, "ddpm": _ddpm}
_FLOW_SAMPLERS = {"flow_euler": _flow_euler, "dpm_solver": _flow_dpm_solver}
_NAMES = {Iddpm.name: list(_IDDPM_SAMPLERS), RectifiedFlow.name: list(_FLOW_SAMPLERS)}


def samplers_of(objective_name: str) -> list[str]:
    """The samplers that work with an objective, the default first."""
    return _NAMES[objective_name]


def default_sampler(objective_name: str) -> str:
    """The sampler an objective is sampled with where none is named."""
    return samplers_of(objective_name)[0]


def check_sampling(objective: Objective | ObjectiveConfig, *, sampler: str | None, steps: int) -> None:
    """Refuses a sampler that can't invert the objective, and a number of steps that it can't take.

    Args:
        objective: The objective, or its config.
        sampler: None is the default.
    Raises:
        ConfigError: Naming the samplers that can, or the steps allowed.
    """
    known = samplers_of(objective.name)
    sampler = default_sampler(objective.name) if sampler is None else sampler
    if sampler not in known:
        raise ConfigError(f"sampler={sampler} does not work with objective.name={objective.name}; use one of: {', '.join(known)}")
    if steps < 1:
        raise ConfigError(f"sampling_steps={steps} must be at least 1")
    if isinstance(objective, Iddpm | IddpmConfig) and steps > objective.timesteps:
        raise ConfigError(f"sampling_steps={steps} exceeds objective.timesteps={objective.timesteps}; use at most that many")
    if sampler == "ddpm" and steps < 2:
        raise ConfigError(
            f"sampling_steps={steps} with sampler=ddpm: ancestral sampling needs at least 2; use sampler=dpm_solver"
        )


def _plan(objective: Objective, *, sampler: str, steps: int, latent: Thw) -> _Plan:
    if isinstance(objective, Iddpm):
        plan = _IDDPM_SAMPLERS[sampler](objective, steps, latent)
    else:
        assert isinstance(objective, RectifiedFlow), objective
        plan = _FLOW_SAMPLERS[sampler](objective, steps, latent)
    if hasattr(plan.scheduler, "set_begin_index"):
        # Otherwise the first step is looked up by its timestep, and found wrong where rounding made two steps alike.
        plan.scheduler.set_begin_index(0)
    return plan


def guide(model_fn: ModelFn, x_BCthW: Tensor, timestep_B: Tensor, *, cfg_scale: float, guided_channels: int | None) -> Tensor:
    """The model's output with classifier-free guidance: uncond + cfg_scale (cond - uncond), from one doubled batch.

    Args:
        cfg_scale: 1 asks the model once, with captions, and returns that.
        guided_channels: Leading channels guidance applies to; the others keep the captioned output. None: all latent channels,
            never the variance. (Open-Sora 1.0 guides 3 of its 4.)
    """
    batch, channels = x_BCthW.shape[:2]
    keep = torch.zeros(batch, dtype=torch.bool, device=x_BCthW.device)
    if cfg_scale == 1:
        return model_fn(x_BCthW, timestep_B, keep)
    output = model_fn(torch.cat([x_BCthW, x_BCthW]), torch.cat([timestep_B, timestep_B]), torch.cat([keep, ~keep]))
    cond, uncond = output.chunk(2)
    cut = channels if guided_channels is None else guided_channels
    guided = uncond[:, :cut] + cfg_scale * (cond[:, :cut] - uncond[:, :cut])
    return torch.cat([guided, cond[:, cut:]], dim=1)


@torch.no_grad()
def sample_latents(
    model_fn: ModelFn,
    *,
    objective: Objective,
    sampler: str | None,
    steps: int,
    cfg_scale: float,
    noise_BCthW: Tensor,
    latent: Thw,
    region: Region | None = None,
    guided_channels: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draws latents from a model.

    Args:
        model_fn: The denoiser; it sees twice the batch where ``cfg_scale`` is not 1.
        objective: What it was trained with.
        sampler: One of ``samplers_of(objective.name)``; None takes the default.
        steps: Model evaluations (each of a doubled batch with guidance).
        cfg_scale: Guidance; 1 turns it off.
        noise_BCthW: Standard normal start, of ``region``.
        latent: Latent shape of the whole samples, which sets the noise shift.
        region: The latents that this rank draws, and ``model_fn`` is shown, where ranks share the samples; None: all.
        guided_channels: As in ``guide``.
        generators: One per video, for ``ddpm``, which draws noise in every step.
    Returns:
        Normalised latents of the region, [B, C, t, h, W], float32, or float64 where the noise is (diffusers computes its steps in float32).
    Raises:
        ConfigError: Sampler, steps or guided channels that don't fit the objective.
    """
    batch, channels = noise_BCthW.shape[:2]
    check_sampling(objective, sampler=sampler, steps=steps)
    sampler = default_sampler(objective.name) if sampler is None else sampler
    if guided_channels is not None and not 1 <= guided_channels <= channels:
        raise ConfigError(f"guided_channels={guided_channels} must be between 1 and the {channels} latent channels, or left out")
    if sampler == "ddpm" and (generators is None or len(generators) != batch):
        raise ValueError("sampler=ddpm draws noise in every step; pass one generator per video, from parallel.keys.Keys")
    plan = _plan(objective, sampler=sampler, steps=steps, latent=latent)
    advance = _advance(plan, generators=generators)
    if sampler == "ddpm" and region is not None:
        advance = _on_whole_samples(advance, latent=latent, region=region)
    x = noise_BCthW if noise_BCthW.dtype == torch.float64 else noise_BCthW.float()
    for level, time in zip(plan.levels, plan.scheduler.timesteps, strict=True):
        level_B = torch.full((batch,), level, dtype=torch.float64, device=x.device)
        output = guide(model_fn, x, objective.timestep(level_B), cfg_scale=cfg_scale, guided_channels=guided_channels)
        x = advance(plan.to_scheduler(output.to(x.dtype)), time, x)
    return x


def _advance(plan: _Plan, *, generators: Sequence[torch.Generator] | None) -> Advance:
    def advance(output: Tensor, time: Tensor, x: Tensor) -> Tensor:
        stepped: Tensor = plan.scheduler.step(output, time, x, generator=list(generators or ()) or None, return_dict=False)[0]
        return stepped

    return advance


def _on_whole_samples(advance: Advance, *, latent: Thw, region: Region) -> Advance:
    """For a scheduler that draws noise, in the shape of what it is given: gives it whole samples, and keeps the region.

    So every rank draws the noise of one process. A step is elementwise: what stands outside the region reaches nothing inside it.
    """
    frames, rows = slice(region.t0, region.t1), slice(region.h0, region.h1)

    def whole(part_BCthW: Tensor) -> Tensor:
        filled = part_BCthW.new_zeros((*part_BCthW.shape[:2], *latent))
        filled[:, :, frames, rows] = part_BCthW
        return filled

    return lambda output, time, x: advance(whole(output), time, whole(x))[:, :, frames, rows].contiguous()
