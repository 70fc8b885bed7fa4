"""Jobs that tests give to Slurm, as ``submit`` would make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.job import Job


def make_job(
    kind: str = "train", *, folder: str = "/runs/clips/launch/0001", site: Any = None, argv: Any = None, **changes: Any
) -> Job:
    """A training of two nodes of eight GPUs, but for ``changes``."""
    home = Path(folder)
    job = Job(
        id="clips-0123abcd",
        name="clips",
        kind=kind,
        argv=argv or ("train", str(home / "config.yaml")),
        nodes=2,
        gpus_per_node=8,
        ranks_per_node=8,
        time_limit_s=86400,
        max_requeues=2,
        run_dir=home.parent.parent,
        folder=home,
        config=home / "config.yaml",
        site=SiteConfig.model_validate(site or {}),
    )
    return replace(job, **changes)


def prepared(**changes: Any) -> Job:
    """A preparation on one GPU."""
    return make_job("prepare", nodes=1, gpus_per_node=1, ranks_per_node=1, argv=("data", "prepare", "/c.yaml"), **changes)
