"""What Kubernetes and SkyPilot have in common: each node of them runs ``opensora-dist node pool``, which brings along what was submitted."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Final

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.job import Job
from opensora_dist.launch.records import LAUNCH_DIR, RECORD_NAME, Record, record_values

AGAIN_CODE: Final = 75
"""A node's exit code that asks to be started again: EX_TEMPFAIL of sysexits.h. Any other but 0 is for good."""

SUBMISSION_VARIABLE: Final = "OPENSORA_SUBMISSION"
"""Holds the files of a submission, as JSON: nodes of a pool may not see the folder that it was written to."""


def as_nodes_see(job: Job) -> Job:
    """The job with its folder in the run directory, wherever the machine that submits keeps it."""
    folder = job.run_dir / LAUNCH_DIR / job.folder.name
    if job.config is None:
        return dataclasses.replace(job, folder=folder)
    config = folder / job.config.name
    argv = tuple(str(config) if word == str(job.config) else word for word in job.argv)
    return dataclasses.replace(job, folder=folder, config=config, argv=argv)


def packed(job: Job, *, backend: str) -> str:
    """Value of ``SUBMISSION_VARIABLE``; pure, so it holds no time."""
    seen = as_nodes_see(job)
    record = record_values(Record(backend=backend, job=seen, job_ids=None, git=None, time=""))
    record["job"]["site"] = job.site.model_dump(mode="json", exclude_defaults=True)
    files = {RECORD_NAME: json.dumps(record)}
    if seen.config is not None:
        files[seen.config.name] = job.config_text
    return json.dumps(files)


def variables(site: SiteConfig) -> dict[str, str]:
    """What every rank's environment holds, but for secrets."""
    network, found = site.network, dict(site.node.variables)
    if network.interface is not None:
        found |= {"GLOO_SOCKET_IFNAME": network.interface, "NCCL_SOCKET_IFNAME": network.interface}
    if network.hcas is not None:
        found["NCCL_IB_HCA"] = network.hcas
    return found


def pool_problems(job: Job) -> list[str]:
    """What no pool can do."""
    problems = []
    if job.array is not None:
        problems.append(
            f"--array {job.array} needs Slurm; here, prepare on one node with more workers, or submit each part by itself: "
            "-- data prepare CONFIG --part 1/8"
        )
    if job.kind != "train" and job.nodes > 1:
        problems.append(f"--nodes {job.nodes} is for train; {job.kind} runs on one node of a pool: pass --nodes 1")
    if job.site.node.modules:
        problems.append("node.modules: pods and rented machines have no `module load`; put it into the image, or node.setup")
    return problems


def node_script(job: Job, *, rank: str, head: str, grace_s: int) -> str:
    """Shell that each node runs.

    Args:
        rank: Shell word that gives this node's number.
        head: Shell word that gives the address of node 0.
        grace_s: How long ranks that are told to stop have for saving.
    """
    node, seen = job.site.node, as_nodes_see(job)
    words = f"--rank {rank} --nodes {job.nodes} --head {head} --port {job.site.network.port} --grace-s {grace_s}"
    pool = f"exec {shlex.quote(node.python)} -m opensora_dist node pool {shlex.quote(str(seen.folder))} {words}"
    return "\n".join(["set -e", *node.setup, pool])
