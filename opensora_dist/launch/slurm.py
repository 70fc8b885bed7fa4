"""Slurm: batch scripts, and sbatch, squeue, sacct and scancel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from opensora_dist.config.site import SiteConfig
from opensora_dist.core.layout import LOGS_DIR
from opensora_dist.launch.base import LaunchError, Phase, Status, UnsureError, ask
from opensora_dist.launch.job import Job, time_limit_text
from opensora_dist.launch.pools import variables
from opensora_dist.launch.templates import TEMPLATES, fill

JOB_SCRIPT: Final = "job.sbatch"
LAST_SCRIPT: Final = "last.sbatch"
SUBMIT_SCRIPT: Final = "submit.sh"
_COPIED: Final = ("network.sh", "node.sh", "rank.sh")
_UNSURE: Final = r"timed out|Connection reset|Zero Bytes"
# What sbatch refuses, and where that is said.
_REMEDIES: Final[Mapping[str, str]] = {
    "partition": "name a partition by slurm.partition",
    "account": "name an account by slurm.account, and a partition that takes it by slurm.partition",
    "qos": "name a qos by slurm.qos",
    "node configuration is not available": "ask for what nodes have: --nodes, --gpus-per-node, and slurm.gpus, gpu_type, memory, cpus_per_task and constraint",
    "time limit": "ask for less --time, or name a partition that gives more by slurm.partition",
}
_GONE: Final = "Invalid job id"
_TRIES: Final = 3  # to cancel what changes meanwhile

# What job.sbatch sets itself, and what of a site's profile does; by every name that sbatch has for it.
_TAKEN: Final[Mapping[str, str]] = {
    **dict.fromkeys(("job-name", "J"), "--name"),
    **dict.fromkeys(("nodes", "N"), "--nodes"),
    **dict.fromkeys(("time", "t"), "--time"),
    **dict.fromkeys(("array", "a"), "--array"),
    **dict.fromkeys(
        ("gpus-per-node", "gpus", "G", "gres", "gpus-per-task", "gpus-per-socket"), "--gpus-per-node and slurm.gpu_type"
    ),
    **dict.fromkeys(("partition", "p"), "slurm.partition"),
    **dict.fromkeys(("account", "A"), "slurm.account"),
    **dict.fromkeys(("qos", "q"), "slurm.qos"),
    **dict.fromkeys(("constraint", "C"), "slurm.constraint"),
    **dict.fromkeys(("cpus-per-task", "c"), "slurm.cpus_per_task"),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "slurm.memory"),
    **dict.fromkeys(("exclusive", "oversubscribe", "s"), "slurm.exclusive"),
    **dict.fromkeys(("signal",), "slurm.signal_s"),
    **dict.fromkeys(("requeue", "no-requeue"), "slurm.requeue and --max-requeues"),
    **dict.fromkeys(("container-image", "container-mounts"), "the section container"),
}
_OURS: Final = frozenset(
    [
        *("comment", "output", "o", "error", "e", "open-mode", "ntasks", "n", "ntasks-per-node", "ntasks-per-socket"),
        *("ntasks-per-core", "ntasks-per-gpu", "chdir", "D", "dependency", "d", "hold", "H", "begin", "b", "parsable"),
        *("wrap", "wait", "W", "test-only", "kill-on-invalid-dep", "input", "i", "no-kill", "k", "het-group", "export"),
        *("export-file", "quiet", "Q", "clusters", "M"),
    ]
)

_PHASES: Final[Mapping[str, Phase]] = {
    **dict.fromkeys(["RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT"], Phase.RUNNING),
    "COMPLETED": Phase.DONE,
    "CANCELLED": Phase.CANCELLED,
    **dict.fromkeys(
        ["FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED", "REVOKED"], Phase.FAILED
    ),
}
# Of an array, whose tasks are in several: the first that any of them is in.
_ORDER: Final = (Phase.RUNNING, Phase.WAITING, Phase.FAILED, Phase.CANCELLED, Phase.DONE)


class SlurmLauncher:
    """A ``Launcher``."""

    name = "slurm"

    def __init__(self, site: SiteConfig) -> None:
        self._site = site

    def problems(self, job: Job) -> list[str]:
        return slurm_problems(job)

    def render(self, job: Job) -> dict[str, str]:
        files = {JOB_SCRIPT: _script(job, array=job.array)}
        if job.array is not None:
            files[LAST_SCRIPT] = _script(job, array=None)
        if len(_steps(job)) > 1:
            after = "afternotok" if job.array is None else "afterok"
            files = {SUBMIT_SCRIPT: fill("slurm/submit.sh.j2", job=job, steps=_steps(job), after=after), **files}
        return files | {name: (TEMPLATES / "slurm" / name).read_text(encoding="utf-8") for name in _COPIED}

    def command(self, job: Job) -> list[str]:
        if len(_steps(job)) > 1:
            return ["bash", str(job.folder / SUBMIT_SCRIPT)]
        return ["sbatch", "--parsable", f"--chdir={job.folder}", str(job.folder / JOB_SCRIPT)]

    def submit(self, job: Job) -> list[str]:
        # submit.sh calls sbatch once per job, and scontrol.
        timeout_s = self._site.slurm.command_timeout_s * (len(_steps(job)) + 1)
        try:
            answer = ask(self.command(job), timeout_s=timeout_s, unsure=_UNSURE)
        except UnsureError:
            raise
        except LaunchError as error:
            raise LaunchError("\n".join([str(error), *self._remedies(str(error))])) from error
        ids = [line.split(";")[0] for line in answer.split()]
        if not ids or not all(i.isdecimal() for i in ids):
            raise UnsureError(f"sbatch printed no job id, but {ids}")
        return ids

    def find(self, job: Job) -> list[str]:
        # What has left the queue has come and gone: there is a log of it.
        return sorted({*self._reasons(job), *_begun(job)}, key=int)

    def settle(self, job: Job) -> list[str]:
        reasons = self._reasons(job)
        # submit.sh didn't come to its end, so that no job of it could begin. One job alone is held by its user.
        if len(_steps(job)) > 1 and "JobHeldUser" in reasons.values():
            self._call(["scancel", *sorted(reasons, key=int, reverse=True)])
            return []
        return self.find(job)

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        if not job_ids:
            return []
        tasks: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for i, state, nodes, used, reason in self._queue(job_ids, "%F|%T|%N|%M|%r"):
            tasks[i].append((state, _words(state, reason, nodes, used)))
        if gone := [i for i in job_ids if i not in tasks]:
            for i, state in self._accounted(gone):
                tasks[_base(i)].append((state.split()[0], f"{state}, by sacct"))
        return [_status(i, tasks[i]) for i in job_ids]

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        ranks = [p for p in (job.run_dir / LOGS_DIR).glob("*/node-0/rank-0.log") if _base(p.parents[1].name) in job_ids]
        if ranks:
            return max(ranks, key=lambda p: (_attempt_order(p.parents[1].name), p.stat().st_mtime))
        # Nothing was started on the nodes yet: what the batch script says.
        scripts = [p for p in job.folder.glob("slurm-*.log") if _base(p.stem.removeprefix("slurm-")) in job_ids]
        if scripts:
            return max(scripts, key=lambda p: p.stat().st_mtime)
        raise LaunchError(
            f"job {', '.join(job_ids)} has written nothing yet; `opensora-dist status {job.run_dir}` says what it waits for"
        )

    def cancel(self, job_ids: Sequence[str]) -> None:
        sent: dict[str, str] = {}
        refused: LaunchError | None = None
        left = self._left(job_ids, sent)
        for _ in range(_TRIES):
            if not left:
                return
            try:
                self._end(left)
            except UnsureError:
                raise
            except LaunchError as error:  # its state is another by now; or it is refused
                refused = error
            else:
                sent |= {i: _ended_by(state) for i, state in left.items()}
            # What began, or was requeued, between the look and the call.
            left = self._left(job_ids, sent)
        if left:
            said = ", ".join(f"{i} ({state})" for i, state in left.items())
            raise LaunchError(f"told to end, and still there: job {said}; the same command tries again") from refused

    def _left(self, job_ids: Sequence[str], sent: Mapping[str, str]) -> dict[str, str]:
        """States of those that nothing ends yet, tasks of an array by themselves.

        The last job first: of a chain, each would start when the one before is cancelled.
        """
        found = self._queue(job_ids, "%i|%T", "--array") if job_ids else []
        ending = [("RUNNING", "TERM"), ("COMPLETING", "KILL")]
        left = {i: s for i, s in found if not _PHASES.get(s, Phase.WAITING).over and (s, sent.get(i)) not in ending}
        return dict(sorted(left.items(), key=lambda item: int(_base(item[0])), reverse=True))

    def _end(self, left: Mapping[str, str]) -> None:
        """One call for each job, in their order."""
        for job in dict.fromkeys(map(_base, left)):
            words = {i: _ended_by(state) for i, state in left.items() if _base(i) == job}
            if killed := [i for i, word in words.items() if word == "KILL"]:
                self._call(["scancel", *killed])
            if told := [i for i, word in words.items() if word == "TERM"]:
                # To the script alone, which gives its ranks slurm.signal_s to save; all at once have KillWait of slurm.conf, half a minute.
                self._call(["scancel", "--batch", "--signal=TERM", *told])

    def _remedies(self, said: str) -> list[str]:
        """Ways out of a refusal, by the words of it."""
        found = [f"{text} in the site file (--site)" for word, text in _REMEDIES.items() if re.search(word, said, re.IGNORECASE)]
        if re.search("partition", said, re.IGNORECASE):
            with suppress(LaunchError):
                known = sorted(
                    {name for line in self._call(["sinfo", "--noheader", "--format=%R"]).splitlines() if (name := line.strip())}
                )
                found.append(f"partitions here are: {', '.join(known)}")
        return found

    def _accounted(self, job_ids: Sequence[str]) -> list[list[str]]:
        """Id and state of what has left the queue; nothing where no accounts are kept."""
        command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(job_ids)}"]
        try:
            return _fields(self._call(command), most=2)
        except UnsureError:
            raise
        except LaunchError as error:
            if re.search(r"accounting storage is disabled|can't be run here", str(error)):
                return []
            raise

    def _queue(self, job_ids: Sequence[str], form: str, *options: str) -> list[list[str]]:
        """What squeue says of jobs; nothing of those that have left it."""
        try:
            return self._squeue(form, f"--jobs={','.join(job_ids)}", *options)
        except LaunchError as error:
            if isinstance(error, UnsureError) or _GONE not in str(error):
                raise
            return []

    def _reasons(self, job: Job) -> dict[str, str]:
        """Why they wait, of all jobs of a submission that squeue knows."""
        return {i: reason for i, reason, comment in self._squeue("%F|%r|%k", "--me") if comment == job.id}

    def _squeue(self, form: str, *options: str) -> list[list[str]]:
        said = self._call(["squeue", "--noheader", "--local", "--states=all", *options, f"--format={form}"])
        return _fields(said, most=form.count("|") + 1)

    def _call(self, command: Sequence[str]) -> str:
        return ask(command, timeout_s=self._site.slurm.command_timeout_s)


def slurm_problems(job: Job) -> list[str]:
    """What Slurm can't be given; field, value, rule and way out of each."""
    slurm, problems = job.site.slurm, []
    if any(c < " " or c == "\x7f" for c in str(job.folder)):
        problems.append(
            f"run.dir={str(job.run_dir)!r} has control characters, which a batch script can't hold; choose another run.dir"
        )
    for option in slurm.options:
        for name in _names(option):
            if name in _TAKEN:
                problems.append(f"slurm.options: {option!r} is set by {_TAKEN[name]}; leave it out there, and use that")
            elif name in _OURS:
                problems.append(f"slurm.options: {option!r} is what the job's script needs for itself; leave it out")
    if _is_sweep(job) and job.site.container.runtime != "none":
        problems.append(
            f"--sweep starts steps of Slurm itself, and container.runtime={job.site.container.runtime} has no Slurm in its image; submit each "
            "point without --sweep, or set container.runtime=none and node.python to an environment of the nodes"
        )
    if job.time_limit_s is not None and job.kind == "train" and job.time_limit_s <= slurm.signal_s:
        problems.append(
            f"--time {time_limit_text(job.time_limit_s)} is no more than slurm.signal_s={slurm.signal_s}, the seconds before it at which the "
            "run is told to save: it would be told at its start; raise --time, or lower slurm.signal_s"
        )
    return problems


def _names(option: str) -> list[str]:
    """What sbatch would take an option for: a long name, of which it takes any beginning, or a letter."""
    long = re.match(r"--([a-zA-Z-]+)", option)
    if long is None:
        return [option[1]]
    word = long[1]
    return [word] if word in _TAKEN or word in _OURS else [n for n in (*_TAKEN, *_OURS) if len(n) > 1 and n.startswith(word)][:1]


def _steps(job: Job) -> list[dict[str, str]]:
    """Jobs of a submission, in their order: scripts, and which round of an array they are."""
    if job.array is not None:
        rounds = [{"script": JOB_SCRIPT, "round": str(r + 1)} for r in range(job.rounds)]
        return [*rounds, {"script": LAST_SCRIPT, "round": ""}]
    jobs = job.max_requeues + 1 if job.site.slurm.requeue == "chain" else 1
    return [{"script": JOB_SCRIPT, "round": ""}] * jobs


def _script(job: Job, *, array: int | None) -> str:
    """A batch script, complete."""
    site = job.site
    start = "step" if job.kind == "prepare" else "script" if _is_sweep(job) else "torchrun"
    checked = site.preflight.enabled and job.kind != "prepare"
    return fill(
        "slurm/job.sbatch.j2",
        job=job,
        options=_options(job, array=array),
        start=start,
        parts=array or 0,
        restarts="never" if job.array is not None and site.slurm.requeue == "chain" else site.slurm.requeue,
        links_per_node=max(job.gpus_per_node, 1),
        device="cuda" if job.gpus_per_node else "cpu",
        preflight_s=round(site.preflight.timeout_s) if checked else 0,
        variables=variables(site),
        **_container(job),
    )


def _is_sweep(job: Job) -> bool:
    return job.kind == "bench" and any(word == "--sweep" or word.startswith("--sweep=") for word in job.argv)


def _container(job: Job) -> dict[str, list[str]]:
    """What comes before a command in a step, after srun's own options, and on the node of the batch script."""
    cores = job.site.slurm.cpus_per_task
    step = [] if cores is None else [f"--cpus-per-task={cores}"]
    box = job.site.container
    if box.runtime == "pyxis":
        inside = [f"--container-image={box.image}"]
        if box.mounts:
            inside.append(f"--container-mounts={','.join(box.mounts)}")
        return {"step_options": step + inside, "container": [], "head": ["srun", "--overlap", "--nodes=1", "--ntasks=1", *inside]}
    if box.runtime == "apptainer":
        command = ["apptainer", "exec", *(["--nv"] if job.gpus_per_node else []), *(w for m in box.mounts for w in ("--bind", m))]
        command.append(str(box.image))
        return {"step_options": step, "container": command, "head": command}
    return {"step_options": step, "container": [], "head": []}


def _options(job: Job, *, array: int | None) -> list[str]:
    """Lines of #SBATCH. No paths: sbatch's own rules of quoting can't hold every one."""
    slurm = job.site.slurm
    options = [
        f"--job-name={job.name}",
        f"--comment={job.id}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--output=slurm-{'%j' if array is None else '%A_%a'}.log",
        "--open-mode=append",
        f"--signal=B:USR1@{slurm.signal_s}",
        "--requeue" if slurm.requeue == "requeue" else "--no-requeue",
    ]
    if array is not None:
        options.append(f"--array=1-{array}")
    if job.time_limit_s is not None:
        options.append(f"--time={time_limit_text(job.time_limit_s)}")
    for name, value in (
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("cpus-per-task", slurm.cpus_per_task),
        ("mem", slurm.memory),
    ):
        if value is not None:
            options.append(f"--{name}={value}")
    if slurm.exclusive:
        options.append("--exclusive")
    if job.gpus_per_node and slurm.gpus != "none":
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        gres = slurm.gpus == "gres"
        options.append(f"--gres=gpu:{kind}{job.gpus_per_node}" if gres else f"--gpus-per-node={kind}{job.gpus_per_node}")
    return options + slurm.options


def _fields(text: str, *, most: int) -> list[list[str]]:
    """Of lines that have as many. The last may hold anything: a comment has '|' and line breaks as its author likes."""
    found = ([field.strip() for field in line.split("|", most - 1)] for line in text.splitlines())
    return [fields for fields in found if len(fields) == most]


def _ended_by(state: str) -> str:
    """What ends a job in this state: what runs saves first."""
    return "TERM" if state == "RUNNING" else "KILL"


def _words(state: str, reason: str, nodes: str, used: str) -> str:
    where = f" on {nodes}" if nodes else ""
    why = f" ({reason})" if reason not in ("", "None") else ""
    return f"{state}{where}{why}, {used}"


def _status(job_id: str, tasks: Sequence[tuple[str, str]]) -> Status:
    if not tasks:
        return Status(job_id=job_id, phase=Phase.UNKNOWN, said="has left the queue")
    phases = {said: _PHASES.get(state, Phase.WAITING) for state, said in tasks}
    phase = next(p for p in _ORDER if p in phases.values())
    return Status(job_id=job_id, phase=phase, said="; ".join(phases))


def _base(name: str) -> str:
    """Job of an attempt, or of an array's task: 12 of 12_3.0."""
    return re.split(r"[._]", name)[0]


def _begun(job: Job) -> set[str]:
    """Jobs of a submission that have begun, in the queue or not: each has a log."""
    return {_base(path.stem.removeprefix("slurm-")) for path in job.folder.glob("slurm-*.log")}


def _attempt_order(name: str) -> tuple[int, ...]:
    """Of ``12.1``; an array's tasks are side by side."""
    job, _, restart = name.rpartition(".")
    return (int(_base(job)), int(restart)) if "_" not in job else (int(_base(job)),)
