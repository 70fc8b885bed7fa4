"""Kubernetes: one TrainJob of Kubeflow Trainer 2 per job, and kubectl.

A TrainJob names a runtime, which an administrator made, and patches what of it the schema lets users patch: volumes, node selectors, the
grace of a pod. How failed pods are restarted is the runtime's alone (``launch/k8s/runtime.yaml`` is one that tells failures apart).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import LaunchError, Phase, Status, UnsureError, ask
from opensora_dist.launch.job import Job
from opensora_dist.launch.k8s_names import k8s_problems
from opensora_dist.launch.pools import SUBMISSION_VARIABLE, node_script, packed, pool_problems, variables
from opensora_dist.launch.templates import fill

MANIFEST_NAME: Final = "trainjob.yaml"
_TIMEOUT_S: Final = 60.0
# What the API server, or who stands before it, says when a request may have been done all the same.
_UNSURE: Final = r"(?i)timeout(?!=)|timed out|EOF|connection reset|broken pipe|context deadline|lost connection|InternalError|ServiceUnavailable|TooManyRequests"


class KubernetesLauncher:
    """A ``Launcher``."""

    name = "k8s"

    def __init__(self, site: SiteConfig) -> None:
        self._k8s = site.k8s

    def problems(self, job: Job) -> list[str]:
        return pool_problems(job) + k8s_problems(job)

    def render(self, job: Job) -> dict[str, str]:
        k8s = job.site.k8s
        devices = {k8s.gpu_resource: job.gpus_per_node} if job.gpus_per_node else {}
        if k8s.rdma_resource is not None:
            devices[k8s.rdma_resource] = 1
        grace_s = max(k8s.grace_s - _MARGIN_S, k8s.grace_s // 2)
        text = fill(
            "k8s/trainjob.yaml.j2",
            job=job,
            k8s=k8s,
            requests={name: v for name, v in (("cpu", k8s.cpus), ("memory", k8s.memory)) if v is not None}
            | {name: str(count) for name, count in devices.items()},
            limits={name: str(count) for name, count in devices.items()},  # devices have no request without a limit
            submission_variable=SUBMISSION_VARIABLE,
            submission=_literal(packed(job, backend=self.name)),
            variables={name: _literal(value) for name, value in variables(job.site).items()},
            secrets=[(name, *place.split("/", 1)) for name, place in k8s.secrets.items()],
            claims=[(f"claim-{i}", claim, path) for i, (claim, path) in enumerate(k8s.claims.items())],
            script=_literal(node_script(job, rank='"$PET_NODE_RANK"', head='"$PET_MASTER_ADDR"', grace_s=grace_s)),
        )
        return {MANIFEST_NAME: text}

    def command(self, job: Job) -> list[str]:
        return self._kubectl("create", "--filename", str(job.folder / MANIFEST_NAME), "--output", "name")

    def submit(self, job: Job) -> list[str]:
        try:
            self._ask(self.command(job))
        except UnsureError:
            raise
        except LaunchError as error:
            if "AlreadyExists" not in str(error):  # its name is this submission's alone: an earlier call got there
                raise
        return [job.id]

    def find(self, job: Job) -> list[str]:
        answer = self._ask(self._kubectl("get", "trainjobs", "--selector", f"opensora-dist/job={job.id}", "--output", "json"))
        return [item["metadata"]["name"] for item in json.loads(answer)["items"]]

    def settle(self, job: Job) -> list[str]:
        return self.find(job)

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        answer = self._ask(self._kubectl("get", "trainjobs", *job_ids, "--ignore-not-found", "--output", "json"))
        # One name gives the object, several a list, none found nothing at all.
        found = json.loads(answer) if answer.strip() else {"items": []}
        jobs = {item["metadata"]["name"]: item for item in found.get("items", [found])}
        gone = "there is no TrainJob of this name: it was deleted"
        return [_status(jobs[i]) if i in jobs else Status(job_id=i, phase=Phase.UNKNOWN, said=gone) for i in job_ids]

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        # kubectl follows five pods unless told otherwise.
        most = ["--max-log-requests", str(job.nodes), "--follow"] if follow else []
        selector = f"jobset.sigs.k8s.io/jobset-name={job_ids[-1]}"
        return self._kubectl("logs", "--selector", selector, "--container", "node", "--prefix", "--tail", "-1", *most)

    def cancel(self, job_ids: Sequence[str]) -> None:
        self._ask(self._kubectl("delete", "trainjobs", *job_ids, "--ignore-not-found", "--wait=false"))

    def _kubectl(self, *words: str) -> list[str]:
        context = [] if self._k8s.context is None else ["--context", self._k8s.context]
        return ["kubectl", *context, "--namespace", self._k8s.namespace, *words]

    def _ask(self, command: Sequence[str]) -> str:
        return ask(command, timeout_s=_TIMEOUT_S, unsure=_UNSURE)


_MARGIN_S: Final = 30
"""Of a pod's grace, what is left for telling the head and deciding, once ranks have saved."""


def _literal(text: str) -> str:
    """What Kubernetes makes ``text`` of: in arguments and in values of variables it reads $(NAME) as a variable's, and $$ as one $."""
    return text.replace("$", "$$")


def _status(job: dict[str, Any]) -> Status:
    """Conditions are TrainJob's: Suspended, Complete, Failed; without one, its pods say whether it runs."""
    status = job.get("status") or {}
    holds = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    active = sum((part.get("active") or 0) for part in status.get("jobsStatus") or [])
    phases = {"Complete": Phase.DONE, "Failed": Phase.FAILED, "Suspended": Phase.WAITING}
    name = job["metadata"]["name"]
    for kind, phase in phases.items():
        if kind in holds:
            said = ": ".join(word for word in (kind, holds[kind].get("reason"), holds[kind].get("message")) if word)
            return Status(job_id=name, phase=phase, said=said)
    if active:
        return Status(job_id=name, phase=Phase.RUNNING, said="its pods are active")
    return Status(job_id=name, phase=Phase.WAITING, said="it has no active pod yet")
