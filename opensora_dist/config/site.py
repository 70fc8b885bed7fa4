"""What a site needs to be told of a job, whoever submits it: one small YAML file per cluster, chosen by ``--site``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from opensora_dist.config.base import Section
from opensora_dist.config.load import Problem, load_config

SITE_VARIABLE = "OPENSORA_SITE"
"""Names the file where ``--site`` doesn't."""


class SlurmSite(Section):
    """How this cluster's Slurm is asked."""

    partition: str | None = Field(None, min_length=1, description="--partition; null is the cluster's default.")
    account: str | None = Field(None, min_length=1, description="--account.")
    qos: str | None = Field(None, min_length=1, description="--qos.")
    constraint: str | None = Field(None, min_length=1, description="--constraint, as in 'h800&ib'.")
    gpus: Literal["gpus_per_node", "gres", "none"] = Field(
        "gpus_per_node", description="How GPUs are asked for; none where nodes are given whole, or have no GPU."
    )
    gpu_type: str | None = Field(None, min_length=1, description="In that request: gpu:TYPE:8.")
    cpus_per_task: int | None = Field(None, ge=1, description="Cores of a node; null leaves it to --exclusive.")
    memory: str | None = Field("0", min_length=1, description="--mem; 0 is all of a node, null the cluster's default.")
    exclusive: bool = Field(True, description="Whole nodes.")
    options: list[str] = Field([], description="More options, one #SBATCH line each, as in --reservation=video.")
    signal_s: int = Field(
        300, ge=10, description="Seconds before the time limit at which a run is told to save and stop (SIGUSR1)."
    )
    requeue: Literal["requeue", "chain"] = Field(
        "requeue",
        description="chain where the site forbids requeueing: --max-requeues jobs more, each afternotok of the one before.",
    )
    command_timeout_s: float = Field(30.0, gt=0, description="How long sbatch, squeue, scontrol and scancel may take.")


class NodeSite(Section):
    """What a node sets up before it runs anything."""

    modules: list[str] = Field([], description="module load, in order.")
    setup: list[str] = Field([], description="Lines of shell, run as they are: source /shared/venv/bin/activate.")
    variables: dict[str, str] = Field(
        {}, description="Environment variables. Secrets don't belong here: they are refused by name."
    )
    python: str = Field("python3", min_length=1, description="Interpreter that has opensora_dist, once all of that is done.")


class NetworkSite(Section):
    """What ranks on different nodes talk over."""

    interface: str | None = Field(None, min_length=1, description="GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, as in eth0.")
    hcas: str | None = Field(None, min_length=1, description="NCCL_IB_HCA, as in mlx5_0,mlx5_1.")
    port: int = Field(29500, ge=1024, le=64000, description="The head's port is this one, plus the job's number modulo 1000.")


class ContainerSite(Section):
    """The image that nodes run, where they don't run bare."""

    runtime: Literal["none", "pyxis", "apptainer"] = Field("none", description="What starts it under Slurm.")
    image: str | None = Field(None, min_length=1, description="Image: a file, or REGISTRY/NAME:TAG.")
    mounts: list[str] = Field(
        [], description="/host/path:/container/path[:ro], of Slurm; run directory and data have to be there."
    )


class PreflightSite(Section):
    """What a node must show before a training starts on it."""

    enabled: bool = Field(
        True, description="Check every node first; one that fails is named, left out, and the job submitted again."
    )
    free_disk_gib: float = Field(10.0, ge=0, description="Free space of the run directory's file system at least.")
    shared_memory_gib: float = Field(1.0, ge=0, description="Size of /dev/shm at least.")
    clock_share: float = Field(0.5, ge=0, le=1, description="Current limit of a GPU's SM clock at least, of its highest.")
    all_reduce_gb_per_s: float = Field(0.0, ge=0, description="Floor of a short all-reduce, bytes of the buffer per second.")
    all_to_all_gb_per_s: float = Field(0.0, ge=0, description="Floor of a short all-to-all, bytes that a rank sends per second.")
    timeout_s: float = Field(180.0, gt=0, description="Of all checks together.")


class K8sSite(Section):
    """How a Kubernetes cluster with Kubeflow Trainer 2 is asked."""

    namespace: str = Field("default", min_length=1, description="Where the TrainJob is made.")
    context: str | None = Field(None, min_length=1, description="kubectl's --context; null is the current one.")
    runtime: str = Field("torch-distributed", min_length=1, description="ClusterTrainingRuntime that the TrainJob names.")
    queue: str | None = Field(None, min_length=1, description="Kueue's LocalQueue; null starts jobs outside Kueue.")
    image: str | None = Field(None, min_length=1, description="Image of the trainer; `docker build .` makes one.")
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1, description="What a node's GPUs are called.")
    cpus: str | None = Field(None, min_length=1, description="CPU request of a node's pod, as in '96'.")
    memory: str | None = Field(None, min_length=1, description="Memory request of a node's pod, as in 1600Gi.")
    shared_memory: str = Field("64Gi", min_length=1, description="Size of /dev/shm; a pod's default of 64 MiB is too small.")
    rdma_resource: str | None = Field(
        None, min_length=1, description="RDMA device, as in rdma/hca_shared_devices_a; adds IPC_LOCK."
    )
    claims: dict[str, str] = Field({}, description="PersistentVolumeClaim: mount path; run directory and data have to be there.")
    secrets: dict[str, str] = Field(
        {}, description="Environment variable: SECRET/KEY that holds its value, as in WANDB_API_KEY: wandb/api-key."
    )
    grace_s: int = Field(300, ge=30, description="Seconds that a pod which is told to stop has for saving, before it is killed.")
    node_selector: dict[str, str] = Field({}, description="Labels that nodes must have.")


class SkySite(Section):
    """What SkyPilot is asked for."""

    infra: str | None = Field(
        None, min_length=1, description="Cloud, region or Kubernetes context: aws/us-east-1; null takes the cheapest."
    )
    accelerator: str = Field("H100", min_length=1, description="GPU type; --gpus-per-node says how many.")
    spot: bool = Field(
        True, description="Spot instances: preempted ones are replaced, and the run goes on from its last checkpoint."
    )
    image: str | None = Field(None, min_length=1, description="docker:REGISTRY/NAME:TAG; null installs by setup.")
    disk_gib: int = Field(512, ge=50, description="Disk of each node.")
    network_tier: Literal["standard", "best"] = Field("best", description="best asks for the fast interconnect between nodes.")
    file_mounts: dict[str, str] = Field({}, description="Path on the nodes: bucket or folder (s3://..., gs://...).")
    volumes: dict[str, str] = Field(
        {}, description="Path on the nodes: SkyPilot volume, made by `sky volumes apply`; the run directory goes on one."
    )
    secrets: list[str] = Field([], description="Names of environment variables that are passed on from where it is submitted.")


class SiteConfig(Section):
    """A cluster, as its users see it."""

    slurm: SlurmSite = Field(SlurmSite(), description="Slurm.")
    node: NodeSite = Field(NodeSite(), description="What a node sets up.")
    network: NetworkSite = Field(NetworkSite(), description="Between nodes.")
    container: ContainerSite = Field(ContainerSite(), description="The image.")
    preflight: PreflightSite = Field(PreflightSite(), description="Checks of nodes.")
    k8s: K8sSite = Field(K8sSite(), description="Kubernetes.")
    sky: SkySite = Field(SkySite(), description="SkyPilot.")


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A part of a name ends so: of HF_TOKEN_READ, PGPASS, GITHUB_PAT, but not of TOKENIZERS_PARALLELISM, nor of NCCL_IB_PKEY.
_SECRET = re.compile(
    r"\w*((?<!P)KEY|TOKEN|SECRET|PASSW(OR)?D|PASSPHRASE|(?<!BY)(?<!COM)PASS|CREDENTIAL|(?<![A-Z])(PAT|PWD))S?(_\w*)?",
    re.IGNORECASE,
)
_OF_A_FILE = re.compile(r"\w*(CREDENTIALS|_FILE|_PATH|_DIR)", re.IGNORECASE)
_HARMLESS = re.compile(r"|\d{1,6}|true|false|yes|no|on|off|none", re.IGNORECASE)
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(?=[\"']?([^\s\"',;]*))")  # the value isn't taken: --export=ALL,NAME=value has two
# Of a URL: who logs in, but not $NAME. A name alone is harmless but where a token may stand in for it, as in https://.
_LOGIN = re.compile(r"\bhttps?://[^/@\s$]+@|://[^/@\s:]*:(?!\$)[^/@\s]+@", re.IGNORECASE)
_REMEDY = "scripts are kept in the run directory; export it where you submit, and leave it out"


def site_path() -> Path | None:
    """The file that the environment names."""
    return Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None


def load_site(path: Path | None) -> SiteConfig:
    """
    Args:
        path: A site's YAML file; None is all defaults.
    Raises:
        ConfigError: Every problem of the file.
    """
    return load_config(SiteConfig, path, rules=site_problems)


def site_problems(site: SiteConfig) -> list[Problem]:
    """The rules between fields, and of what shell and YAML can't hold."""
    return [
        *_text_problems(site),
        *_variable_problems(site),
        *_python_problems(site.node),
        *_slurm_problems(site.slurm),
        *_container_problems(site.container),
    ]


def _text_problems(section: Section, *, at: str = "") -> list[Problem]:
    """No shell holds a NUL, and no file a password."""
    problems = []
    for name in type(section).model_fields:
        field, value = f"{at}{name}", getattr(section, name)
        if isinstance(value, Section):
            problems += _text_problems(value, at=f"{field}.")
        elif any("\0" in text for text in _texts(value)):
            said = f"{field}={value!r} holds a NUL, which no shell can; take it out"
            problems.append(Problem(fields=(field,), message=said))
        elif any(_LOGIN.search(text) for text in _texts(value)):
            said = f"{field} holds a URL with a user or password in it; {_REMEDY}"
            problems.append(Problem(fields=(field,), message=said))
    return problems


def _texts(value: object) -> list[str]:
    """Of a field: itself, or what is in it."""
    if isinstance(value, dict):
        return [str(text) for pair in value.items() for text in pair]
    return [str(text) for text in value] if isinstance(value, list) else [str(value)]


def _variable_problems(site: SiteConfig) -> list[Problem]:
    problems = []
    for name, value in site.node.variables.items():
        field = f"node.variables.{name}"
        if not _NAME.fullmatch(name):
            said = f"{field}: {name!r} is no name of a variable; use letters, digits and _"
            problems.append(Problem(fields=(field,), message=said))
        elif _is_secret(name, value):
            problems.append(Problem(fields=(field,), message=f"{field} looks like a secret; {_REMEDY}"))
    for field, lines in (("node.setup", site.node.setup), ("slurm.options", site.slurm.options)):
        for name, value in (match.groups() for line in lines for match in _ASSIGNED.finditer(line)):
            read = field == "node.setup" and value.startswith("$")  # by a shell, where it runs
            if not read and _is_secret(name, value):
                problems.append(Problem(fields=(field,), message=f"{field} sets {name}, which looks like a secret; {_REMEDY}"))
    return problems


def _is_secret(name: str, value: str) -> bool:
    """By its name, since a secret looks like nothing in particular."""
    a_path = _OF_A_FILE.fullmatch(name) is not None and value.startswith(("/", "~/"))
    return _SECRET.fullmatch(name) is not None and not a_path and not _HARMLESS.fullmatch(value)


def _python_problems(node: NodeSite) -> list[Problem]:
    """Scripts quote it, so that a shell expands nothing in it."""
    if not node.python.startswith("~") and "$" not in node.python:
        return []
    said = f"node.python={node.python!r} is taken as it is, without a shell that would expand ~ or $; write the whole path"
    return [Problem(fields=("node.python",), message=said)]


def _slurm_problems(slurm: SlurmSite) -> list[Problem]:
    """``#SBATCH`` lines end at a space or a line break, and a quote has no meaning there that could be relied on."""
    problems = []
    for name in ("partition", "account", "qos", "constraint", "gpu_type", "memory"):
        value = getattr(slurm, name)
        if value is not None and re.search(r"[\s'\"\\\\#]", value):
            said = f"slurm.{name}={value!r} holds a space, a quote, a backslash or a #, which an #SBATCH line can't; no name in Slurm has one"
            problems.append(Problem(fields=(f"slurm.{name}",), message=said))
    for option in slurm.options:
        if not re.fullmatch(r"--?[A-Za-z][^\n]*", option):
            said = f"slurm.options: {option!r} is no option of sbatch on one line; write e.g. --reservation=video"
            problems.append(Problem(fields=("slurm.options",), message=said))
    return problems


def _container_problems(container: ContainerSite) -> list[Problem]:
    problems = []
    if container.runtime != "none" and container.image is None:
        said = f"container.runtime={container.runtime} needs container.image; name an image, or set container.runtime=none"
        problems.append(Problem(fields=("container.image",), message=said))
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:r[ow])?", mount):
            said = f"container.mounts: {mount!r} is not /host/path:/container/path or that with :ro; paths with spaces, commas or colons can't be mounted"
            problems.append(Problem(fields=("container.mounts",), message=said))
    return problems
