"""What can befall a training on a real Slurm, each time for real: it goes on from what it saved, and ends as a run that nothing happened to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from cluster import Cluster, wait_for
from runs import EVERY, STEPS, Run

Submit = Callable[..., Run]
NeverStopped = Callable[[int], list[tuple[Any, ...]]]
_MIDDLE = EVERY + 2


def test_told_before_its_time_limit_a_run_saves_is_requeued_and_ends_as_one_never_stopped(
    submit: Submit, never_stopped: NeverStopped
) -> None:
    """2 nodes x 2 ranks: sp 2 x dp 2. Slurm may send the signal up to a minute earlier than it is asked to."""
    slowly = {"variables": {"OPENSORA_TEST_PAUSE_S": "4"}}
    run = submit(2, 2, "--time", "0:02:00", node=slowly, slurm={"signal_s": 30})
    assert run.ends(limit_s=280) == "COMPLETED", run.said()
    job, (first, second) = run.job_ids[-1], run.starts()
    assert first == 0 and 0 < second < STEPS, "saved when it was told to, and went on from there"
    assert run.cluster.job(job)["Restarts"] == "1"
    logs = {f"{job}.{restart}/node-{rank // 2}/rank-{rank}.log" for restart in range(2) for rank in range(4)}
    assert logs <= run.logs().keys()
    assert "done" in run.cluster.call("opensora-dist", "status", run.folder)
    assert run.curve() == never_stopped(4)


def test_preempted_by_a_higher_partition_a_run_on_four_nodes_makes_room_and_goes_on(
    submit: Submit, cluster: Cluster, never_stopped: NeverStopped
) -> None:
    run = submit(4, 1)
    run.reaches(_MIDDLE)
    urgent = cluster.sbatch("srun hostname", "--partition=urgent", "--nodes=2", "--exclusive")
    assert cluster.ends(urgent, limit_s=90) == "COMPLETED"
    stopped_at = run.step()
    assert _MIDDLE <= stopped_at < STEPS
    assert run.ends() == "COMPLETED", run.said()
    assert run.starts() == [0, stopped_at], "no step is made twice: it saved when it was told to"
    assert run.curve() == never_stopped(4)


def test_a_worker_node_that_dies_costs_what_was_trained_since_the_last_commit(
    submit: Submit, never_stopped: NeverStopped
) -> None:
    _goes_on_after_death_of(submit(2, 1), rank=1)(never_stopped(2))


def test_a_head_node_that_dies_costs_what_was_trained_since_the_last_commit(submit: Submit, never_stopped: NeverStopped) -> None:
    """With it the job's script dies, too: Slurm starts the job again."""
    _goes_on_after_death_of(submit(2, 1), rank=0)(never_stopped(2))


def _goes_on_after_death_of(run: Run, *, rank: int) -> Callable[[list[tuple[Any, ...]]], None]:
    run.reaches(_MIDDLE)
    run.cluster.hosts.kill(run.node_of(rank, ranks_per_node=1))
    assert run.ends() == "COMPLETED", run.said()

    def compare(never_stopped: list[tuple[Any, ...]]) -> None:
        assert run.starts() == [0, EVERY]
        assert run.curve() == never_stopped

    return compare


def test_a_link_cut_in_mid_step_ends_the_attempt_within_its_limits_and_mended_the_run_goes_on(
    submit: Submit, cluster: Cluster, never_stopped: NeverStopped
) -> None:
    """The job may run on these two nodes alone, so it waits for the one that is cut off.

    Slurm may take that one, as it comes back, from the job that was just started again: it gives up its first step, and tries once more.
    """
    run = submit(2, 1, slurm={"options": ["--nodelist=node1,node2"]})
    run.reaches(_MIDDLE)
    cluster.hosts.cut("node2")
    cut = time.monotonic()
    job = run.job_ids[-1]
    wait_for(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), limit_s=90, what=run.said)
    ended_s = time.monotonic() - cut
    wait_for(lambda: not _ranks(cluster, "node2"), limit_s=60, what=run.said)
    cluster.hosts.mend("node2")
    assert run.ends(limit_s=300) == "COMPLETED", run.said()
    assert run.starts() == [0, EVERY]
    assert ended_s < 60, "watchdog_s is 10, SlurmdTimeout 10"
    assert run.curve() == never_stopped(2)


def _ranks(cluster: Cluster, node: str) -> list[str]:
    """Command lines of the processes of a training on a node."""
    lines = []
    for pid in cluster.hosts[node].processes():
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                lines.append(file.read().replace("\0", " "))
        except OSError:  # it ended meanwhile
            continue
    return [line for line in lines if "opensora_dist" in line]


def test_cancelled_by_its_user_a_run_saves_is_not_requeued_and_goes_on_when_submitted_again(
    submit: Submit, cluster: Cluster, never_stopped: NeverStopped
) -> None:
    run = submit(2, 1)
    run.reaches(_MIDDLE)
    cluster.call("scancel", run.job_ids[-1])
    assert run.ends(limit_s=60) == "CANCELLED"
    wait_for(lambda: not cluster.jobs(), limit_s=30, what=run.said)
    saved = json.loads((run.folder / "STOPPED").read_text())["step"]
    assert saved == run.step() >= _MIDDLE and (run.folder / "checkpoints" / f"step-{saved:08d}").is_dir()
    assert cluster.job(run.job_ids[-1])["Restarts"] == "0"
    again = submit(2, 1)
    assert again.ends() == "COMPLETED", again.said()
    assert again.starts() == [0, saved]
    assert again.curve() == never_stopped(2)


def test_where_requeueing_is_forbidden_a_chain_of_jobs_goes_on_and_ends_with_the_run(
    submit: Submit, cluster: Cluster, never_stopped: NeverStopped
) -> None:
    run = submit(2, 1, "--max-requeues", "2", config=(f"fault.kill_rank=1@step{_MIDDLE}",), slurm={"requeue": "chain"})
    first, second, third = run.job_ids
    assert cluster.ends(second, limit_s=150) == "COMPLETED", run.said()
    wait_for(lambda: not cluster.jobs(), limit_s=60, what=cluster.logs)
    assert cluster.job(first)["JobState"] == "FAILED"
    assert cluster.job(third)["JobState"] == "CANCELLED", "there was nothing left to do for it"
    assert run.starts() == [0, EVERY]
    assert run.curve() == never_stopped(2)
