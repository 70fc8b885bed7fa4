"""Discrete diffusion with learned variance, as Open-Sora 1.0 trains: mean squared error plus the variational bound.

Source: Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672, and its public implementation.
"""

# B batch, C latent channels, T H W latent frames, height, width; coefficients are [B, 1, 1, 1, 1]

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_dist.config.train import IddpmConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys

_BIN = 1 / 255  # half the width of a bin of 8-bit data scaled to [-1, 1]


class _Coefficients(NamedTuple):
    """The schedule at each timestep, or at the timestep of each sample."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor
    log_betas: Tensor


def linear_betas(timesteps: int) -> Tensor:
    """Linear betas, 1e-4 to 0.02 at 1000 steps, scaled so that another number of steps adds as much noise; float64."""
    assert timesteps > 20, "the last beta must be below 1, as the config sees to"
    return torch.linspace(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps, timesteps, dtype=torch.float64)


def _coefficients(betas: Tensor) -> _Coefficients:
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    return _Coefficients(
        sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
        sqrt_recip_alphas_cumprod=(1 / alphas_cumprod).sqrt(),
        sqrt_recipm1_alphas_cumprod=(1 / alphas_cumprod - 1).sqrt(),
        posterior_mean_x0=betas * previous.sqrt() / (1 - alphas_cumprod),
        posterior_mean_xt=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        # The posterior variance at t = 0 is 0; its logarithm is taken from t = 1 instead.
        posterior_log_variance=torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        log_betas=betas.log(),
    )


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    spread = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + spread + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function, which published weights were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability, elementwise and in nats, of the 8-bit bin of [-1, 1] that ``x`` lies in; the outer bins are open."""
    centered, inverse_std = x - means, torch.exp(-log_scales)
    below_upper = _normal_cdf(inverse_std * (centered + _BIN))
    below_lower = _normal_cdf(inverse_std * (centered - _BIN))

    def log(probability: Tensor) -> Tensor:
        return probability.clamp(min=1e-12).log()

    inner = torch.where(x > 0.999, log(1 - below_lower), log(below_upper - below_lower))
    return torch.where(x < -0.999, log(below_upper), inner)


class Iddpm:
    """Objective ``iddpm``: the model outputs [noise, variance]; a level is a timestep, 0 to timesteps - 1."""

    name = "iddpm"
    channel_multiplier = 2

    def __init__(self, config: IddpmConfig) -> None:
        self.caption_dropout = config.caption_dropout
        self.timesteps = config.timesteps
        self.betas = linear_betas(config.timesteps)
        self._tables = {torch.device("cpu"): torch.stack(_coefficients(self.betas))}

    def draw_level(self, keys: Keys, *, sample: int, step: int, latent: Thw) -> float:
        """A timestep, uniform over the schedule."""
        generator = keys.generator("sigma", sample, step)
        return float(torch.empty((), dtype=torch.int64).random_(0, self.timesteps, generator=generator))

    def corrupt(self, x0_BCTHW: Tensor, noise_BCTHW: Tensor, level_B: Tensor) -> Tensor:
        """sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
        at = self._at(level_B, x0_BCTHW.dtype)
        return at.sqrt_alphas_cumprod * x0_BCTHW + at.sqrt_one_minus_alphas_cumprod * noise_BCTHW

    def timestep(self, level_B: Tensor) -> Tensor:
        """The level itself."""
        return level_B

    def loss(self, output_BCTHW: Tensor, *, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """Squared error of the noise plus the variational bound in bits, [B, T, H, W]."""
        predicted, variance = output_BCTHW.chunk(2, dim=1)
        mse = (predicted - noise) ** 2
        # The bound teaches the variance only: through the mean it would drown the squared error in noisy gradients.
        bound = self._bound_bits(predicted.detach(), variance, x0=x0, noise=noise, level_B=level_B)
        return (mse + bound).mean(dim=1)

    def _bound_bits(self, predicted_noise: Tensor, variance: Tensor, *, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """The variational bound's term at each sample's timestep, elementwise: a KL, or the data's likelihood at t = 0."""
        at = self._at(level_B, x0.dtype)
        xt = self.corrupt(x0, noise, level_B)
        predicted_x0 = at.sqrt_recip_alphas_cumprod * xt - at.sqrt_recipm1_alphas_cumprod * predicted_noise
        true_mean = at.posterior_mean_x0 * x0 + at.posterior_mean_xt * xt
        mean = at.posterior_mean_x0 * predicted_x0 + at.posterior_mean_xt * xt
        share = (variance + 1) / 2  # the output interpolates, in log space, from the posterior's variance (-1) to beta (1)
        log_variance = share * at.log_betas + (1 - share) * at.posterior_log_variance
        kl = normal_kl(true_mean, at.posterior_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, means=mean, log_scales=0.5 * log_variance)
        return torch.where((level_B == 0).view(-1, 1, 1, 1, 1), nll, kl) / math.log(2)

    def _at(self, level_B: Tensor, dtype: torch.dtype) -> _Coefficients:
        """The schedule's coefficients at each sample's timestep, gathered in float64, each [B, 1, 1, 1, 1]."""
        if level_B.device not in self._tables:  # moved once: a copy in every step would make the host wait for the device
            self._tables[level_B.device] = self._tables[torch.device("cpu")].to(level_B.device)
        rows = self._tables[level_B.device][:, level_B.long()].to(dtype)
        return _Coefficients(*rows.view(len(rows), -1, 1, 1, 1, 1).unbind())
