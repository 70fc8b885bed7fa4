"""Jobs whose manifests are kept in tests/golden: one with as little as can be, and one with all that a site can say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from opensora_dist.config.site import K8sSite, NetworkSite, NodeSite, SiteConfig, SkySite
from opensora_dist.launch.job import Job

FOLDER = Path("/runs/clips/launch/0001")
SMALL_SITE = SiteConfig(
    k8s=K8sSite(image="opensora-dist:0.1", claims={"runs": "/runs"}),
    sky=SkySite(volumes={"/runs": "runs"}),
)
FULL_SITE = SiteConfig(
    node=NodeSite(
        setup=["source /opt/venv/bin/activate", "ulimit -l unlimited"], variables={"OMP_NUM_THREADS": "8"}, python="python"
    ),
    network=NetworkSite(interface="eth0", hcas="mlx5_0,mlx5_1", port=29600),
    k8s=K8sSite(
        namespace="video",
        context="h100",
        runtime="opensora-torch",
        queue="video-queue",
        image="images/opensora-dist:0.1",
        cpus="96",
        memory="1600Gi",
        shared_memory="256Gi",
        rdma_resource="rdma/hca_shared_devices_a",
        claims={"runs": "/runs", "clips": "/data/clips"},
        secrets={"WANDB_API_KEY": "wandb/api-key"},
        grace_s=600,
        node_selector={"cloud.example.com/pool": "h100"},
    ),
    sky=SkySite(
        infra="kubernetes/h100",
        accelerator="H100",
        spot=False,
        image="docker:images/opensora-dist:0.1",
        disk_gib=1024,
        network_tier="standard",
        volumes={"/runs": "runs"},
        file_mounts={"/data/clips": "s3://clips"},
        secrets=["WANDB_API_KEY"],
    ),
)


def pool_job(site: SiteConfig = SMALL_SITE, **changes: object) -> Job:
    """A training on one node with one GPU, or as ``changes`` say."""
    values: dict[str, object] = {
        "id": "clips-0a1b2c3d",
        "name": "clips",
        "kind": "train",
        "argv": ("train", str(FOLDER / "config.yaml")),
        "nodes": 1,
        "gpus_per_node": 1,
        "ranks_per_node": 1,
        "time_limit_s": None,
        "max_requeues": 3,
        "run_dir": Path("/runs/clips"),
        "folder": FOLDER,
        "config": FOLDER / "config.yaml",
        "config_text": 'run: {name: clips, dir: /runs/clips}\n# "quoted", $HOME, `id` and #\n',
        "site": site,
    }
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def pool_jobs(backend: str) -> dict[str, Job]:
    """By the name of the golden file."""
    full = pool_job(FULL_SITE, nodes=4, gpus_per_node=8, ranks_per_node=8, time_limit_s=86400 if backend == "k8s" else None)
    cpus = pool_job(SMALL_SITE, nodes=2, gpus_per_node=0, ranks_per_node=2)
    return {"small": pool_job(), "full": full, "cpus": cpus}


def as_kubernetes_reads(text: str, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    """What a container is given of a value or an argument of its pod: k8s.io/kubernetes/third_party/forked/golang/expansion."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)
