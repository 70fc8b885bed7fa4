"""SkyPilot: one managed job per job, which it moves to other machines when they are preempted, and its command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import LaunchError, Phase, Status, UnsureError, ask
from opensora_dist.launch.job import Job
from opensora_dist.launch.pools import AGAIN_CODE, SUBMISSION_VARIABLE, node_script, packed, pool_problems, variables
from opensora_dist.launch.templates import fill

TASK_NAME: Final = "task.yaml"
# The first managed job of a user makes a controller machine first, which takes minutes.
_LAUNCH_TIMEOUT_S: Final = 1800.0
_ASK_TIMEOUT_S: Final = 180.0
# A cancelled or preempted machine gives no notice that could be relied on.
_GRACE_S: Final = 90
# What `sky` ends with where nothing was sent, or the server took nothing; whatever else fails may have arrived. Not
# ApiServerConnectionError: it comes before a request, and also while its answer is waited for.
_REFUSALS: Final = frozenset(
    f"sky.exceptions.{name}" for name in ("InvalidSkyPilotConfigError", "NoCloudAccessError", "ResourcesUnavailableError")
)
_RAISED: Final = re.compile(r"(?:^|failed with \d+: )((?:\w+\.)+[A-Z]\w+)(?::|$)", re.MULTILINE)
_UNSENT: Final = re.compile(r"failed with \d+: Usage: |^`sky` can't be run here")
# Where no job ran for long, or none ever did, there is no controller to ask, and no job.
_NO_JOBS: Final = re.compile(
    r"(?:^|failed with \d+: )sky\.exceptions\.ClusterNotUpError: .*No in-progress managed jobs", re.MULTILINE
)
_NAME: Final = re.compile(r"[a-zA-Z]+[a-zA-Z0-9]*(?:[._-]{1,2}[a-zA-Z0-9]+)*")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PHASES: Final = {
    **dict.fromkeys(("PENDING", "SUBMITTED", "STARTING", "RECOVERING"), Phase.WAITING),
    **dict.fromkeys(("RUNNING", "WINDING_DOWN", "CANCELLING"), Phase.RUNNING),
    "SUCCEEDED": Phase.DONE,
    "CANCELLED": Phase.CANCELLED,
}


class SkyLauncher:
    """A ``Launcher``."""

    name = "sky"

    def __init__(self, site: SiteConfig) -> None:
        self._sky = site.sky

    def problems(self, job: Job) -> list[str]:
        return pool_problems(job) + _problems(job)

    def render(self, job: Job) -> dict[str, str]:
        sky = job.site.sky
        text = fill(
            "sky/task.yaml.j2",
            job=job,
            sky=sky,
            accelerators=f"{sky.accelerator}:{job.gpus_per_node}",
            again_code=AGAIN_CODE,
            submission_variable=SUBMISSION_VARIABLE,
            submission=packed(job, backend=self.name),
            variables=variables(job.site),
            script=node_script(
                job, rank='"$SKYPILOT_NODE_RANK"', head='"$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"', grace_s=_GRACE_S
            ),
        )
        return {TASK_NAME: text}

    def command(self, job: Job) -> list[str]:
        secrets = [word for name in job.site.sky.secrets for word in ("--secret", name)]
        return ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(job.folder / TASK_NAME)]

    def submit(self, job: Job) -> list[str]:
        try:
            ask(self.command(job), timeout_s=_LAUNCH_TIMEOUT_S)
        except UnsureError:
            raise
        except LaunchError as error:
            if _was_refused(str(error)):
                raise
            raise UnsureError(str(error)) from error
        # Asked for rather than read from what it printed, which is for people.
        if not (found := self.find(job)):
            raise UnsureError(f"`sky jobs launch` ended without an error, and `sky jobs queue` shows no job {job.id} yet")
        return found

    def find(self, job: Job) -> list[str]:
        return [str(entry["job_id"]) for entry in self._queue() if entry.get("job_name") == job.id]

    def settle(self, job: Job) -> list[str]:
        return self.find(job)

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        known = {str(entry["job_id"]): entry for entry in self._queue()}
        gone = "SkyPilot's queue has no job of this id"
        return [_status(i, known[i]) if i in known else Status(job_id=i, phase=Phase.UNKNOWN, said=gone) for i in job_ids]

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        return ["sky", "jobs", "logs", "--follow" if follow else "--no-follow", job_ids[-1]]

    def cancel(self, job_ids: Sequence[str]) -> None:
        over = {status.job_id for status in self.status(job_ids) if status.phase.over}
        if left := [job_id for job_id in job_ids if job_id not in over]:
            ask(["sky", "jobs", "cancel", "--yes", *left], timeout_s=_ASK_TIMEOUT_S)

    def _queue(self) -> list[dict[str, Any]]:
        command = ["sky", "jobs", "queue", "--all", "--output", "json"]
        try:
            answer = ask(command, timeout_s=_ASK_TIMEOUT_S)
        except LaunchError as error:
            if _NO_JOBS.search(str(error)):
                return []
            raise
        try:
            found = json.loads(answer[answer.index("[") :])
        except ValueError as error:
            raise LaunchError(
                f"`{' '.join(command)}` printed no list of jobs: {answer.strip()[:500]!r}; update skypilot"
            ) from error
        return [entry for entry in found if isinstance(entry, dict)]


def _was_refused(said: str) -> bool:
    """By the exception that `sky` ended with: the last of those that led to each other."""
    raised = _RAISED.findall(said)
    return raised[-1] in _REFUSALS if raised else _UNSENT.search(said) is not None


def _status(job_id: str, entry: dict[str, Any]) -> Status:
    said = str(entry.get("status") or "no status")
    phase = _PHASES.get(said.upper(), Phase.FAILED if said.upper().startswith("FAILED") else Phase.WAITING)
    reason = entry.get("failure_reason")
    return Status(job_id=job_id, phase=phase, said=f"{said}: {reason}" if reason else said)


def _problems(job: Job) -> list[str]:
    sky, problems = job.site.sky, []
    if not _NAME.fullmatch(job.name):
        words = re.sub(r"[^a-zA-Z0-9]+", "-", job.name).strip("-")
        offered = words if words[:1].isalpha() else f"run-{words}"
        problems.append(
            f"--name {job.name!r} (default: run.name) must begin with a letter, with single '-', '_' or '.' between letters and digits, for "
            f"SkyPilot; pass --name {offered}"
        )
    if job.time_limit_s is not None:
        problems.append(
            "--time: SkyPilot knows no time limit; leave it out, and end the run by run.steps or `opensora-dist cancel`"
        )
    for name in sky.secrets:
        if not _VARIABLE.fullmatch(name):
            problems.append(
                f"sky.secrets: {name!r} must be the name of an environment variable, as in WANDB_API_KEY, not its value"
            )
    for field, mounts in (("file_mounts", sky.file_mounts), ("volumes", sky.volumes)):
        for path in mounts:
            if not path.startswith("/"):
                problems.append(f"sky.{field}: {path!r} must be an absolute path on the nodes")
    if any(job.run_dir.is_relative_to(path) for path in sky.file_mounts):
        problems.append(
            f"run.dir={job.run_dir} is in a bucket (sky.file_mounts), where checkpoints can't be renamed when they are whole, and nodes don't "
            "see each other's files at once; choose a path of sky.volumes, or of a file system that node.setup mounts"
        )
    elif not any(job.run_dir.is_relative_to(path) for path in sky.volumes) and not job.site.node.setup:
        problems.append(
            f"run.dir={job.run_dir} would be on a disk that is gone with its machine: put it on a path of sky.volumes, or have node.setup mount "
            "a shared file system there"
        )
    return problems
