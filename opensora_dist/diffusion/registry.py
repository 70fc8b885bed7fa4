"""From the ``objective`` section of a config to an objective."""

from __future__ import annotations

from opensora_dist.config.train import IddpmConfig, ObjectiveConfig
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.iddpm import Iddpm
from opensora_dist.diffusion.rectified_flow import RectifiedFlow


def build_objective(config: ObjectiveConfig, *, spatial_factor: int) -> Objective:
    """Builds the objective a config names.

    Args:
        config: The ``objective`` section.
        spatial_factor: Pixels per latent of the codec (``DatasetSpec.spatial_factor``).
    """
    if isinstance(config, IddpmConfig):
        return Iddpm(config)
    return RectifiedFlow(config, spatial_factor=spatial_factor)
