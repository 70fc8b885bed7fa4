"""What Kubernetes lets names, labels and quantities be (RFC 1123 and 1035), said before the API server refuses them one by one."""

from __future__ import annotations

import re
from typing import Final

from opensora_dist.launch.job import Job

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SERVICE: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_KEY: Final = re.compile(r"[-._A-Za-z0-9]{1,253}")
_QUANTITY: Final = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|[MGTPE]i?|Ki)?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PET: Final = "PET_"


def k8s_problems(job: Job) -> list[str]:
    """Of the job's name and of ``site.k8s``; field, value, rule and way out of each."""
    return _name_problems(job) + _field_problems(job) + _mount_problems(job)


def _name_problems(job: Job) -> list[str]:
    """A TrainJob's name goes into names of Services, Jobs and pods, and those end in ``-node-0-INDEX-xxxxx``."""
    # 63 characters of a label, less that, less what makes the id unique.
    most = 63 - len(f"-node-0-{job.nodes - 1}-") - 5 - (len(job.id) - len(job.name))
    if _SERVICE.fullmatch(job.name) and len(job.name) <= most:
        return []
    words = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    offered = (words if re.match(r"[a-z]", words) else f"run-{words}")[:most].rstrip("-")
    return [
        f"--name {job.name!r} (default: run.name) must be lower-case letters, digits and '-', begin with a letter, and have at most {most} "
        f"characters, since pods of Kubernetes are named after it; pass --name {offered}"
    ]


def _field_problems(job: Job) -> list[str]:
    k8s, problems = job.site.k8s, []
    if k8s.image is None:
        problems.append("k8s.image is not set, and pods need one; `docker build .` makes it (docs/docker.md)")
    for field, text, pattern, rule in (
        ("namespace", k8s.namespace, _LABEL, "a DNS label: at most 63 lower-case letters, digits and '-'"),
        ("queue", k8s.queue, _LABEL, "a DNS label: at most 63 lower-case letters, digits and '-'"),
        ("runtime", k8s.runtime, _SUBDOMAIN, "a DNS name: lower-case letters, digits, '-' and '.'"),
        ("cpus", k8s.cpus, _QUANTITY, "a quantity, as in 96 or 500m"),
        ("memory", k8s.memory, _QUANTITY, "a quantity, as in 1600Gi"),
        ("shared_memory", k8s.shared_memory, _QUANTITY, "a quantity, as in 64Gi"),
    ):
        if text is not None and not pattern.fullmatch(text):
            problems.append(f"k8s.{field}={text!r} must be {rule}")
    for field, text in (("gpu_resource", k8s.gpu_resource), ("rdma_resource", k8s.rdma_resource)):
        if text is not None and not _qualified(text):
            problems.append(
                f"k8s.{field}={text!r} must be the name of a device, as in nvidia.com/gpu; `kubectl describe node` lists them"
            )
    for name, value in k8s.node_selector.items():
        if not _qualified(name) or not _VALUE.fullmatch(value):
            problems.append(f"k8s.node_selector: {name}={value!r} is no label: at most 63 letters, digits, '-', '_' and '.' each")
    for name, place in k8s.secrets.items():
        secret, _, key = place.partition("/")
        if not _VARIABLE.fullmatch(name) or not _SUBDOMAIN.fullmatch(secret) or not _KEY.fullmatch(key):
            problems.append(f"k8s.secrets: {name}: {place!r} must be VARIABLE: SECRET/KEY, as in WANDB_API_KEY: wandb/api-key")
    for name in (*k8s.secrets, *job.site.node.variables):
        if name.startswith(_PET):
            problems.append(
                f"{name} is Kubeflow Trainer's, which refuses it; leave it out: torchrun gets its options on its command line"
            )
    return problems


def _mount_problems(job: Job) -> list[str]:
    k8s, problems = job.site.k8s, []
    for claim, path in k8s.claims.items():
        if not _SUBDOMAIN.fullmatch(claim):
            problems.append(
                f"k8s.claims: {claim!r} must be the name of a PersistentVolumeClaim: lower-case letters, digits, '-' and '.'"
            )
        if not path.startswith("/") or ":" in path or path == "/dev/shm":
            problems.append(f"k8s.claims: {claim}: {path!r} must be an absolute path without ':', and not /dev/shm")
    if not any(job.run_dir.is_relative_to(path) for path in k8s.claims.values()):
        mounted = ", ".join(k8s.claims.values()) or "none is set"
        problems.append(
            f"run.dir={job.run_dir} is in no mount path of k8s.claims ({mounted}), so it would be gone with its pod; choose one that is"
        )
    return problems


def _qualified(name: str) -> bool:
    """``prefix/name``, or a name alone."""
    prefix, slash, rest = name.rpartition("/")
    return bool(rest) and bool(_VALUE.fullmatch(rest)) and (not slash or bool(_SUBDOMAIN.fullmatch(prefix)))
