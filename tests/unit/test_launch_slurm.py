"""What Slurm is given, character by character, and how its answers are read. ``OPENSORA_GOLDEN=write`` writes the golden files anew.

What its batch scripts do is in test_slurm_script.py; the real Slurm is in tests/slurm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_jobs import make_job, prepared

from opensora_dist.config.site import SiteConfig, site_problems
from opensora_dist.launch import slurm as module
from opensora_dist.launch.base import LaunchError, Phase, UnsureError
from opensora_dist.launch.slurm import SlurmLauncher

SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
GOLDEN = Path(__file__).parent.parent / "golden/slurm"
FULL_SITE = {
    "slurm": {
        **{"partition": "video", "account": "team-7", "qos": "long", "constraint": "h800&ib", "gpus": "gres", "gpu_type": "h800"},
        **{"cpus_per_task": 96, "memory": "1900G", "options": ["--reservation=video", "--exclude=node9"], "signal_s": 600},
    },
    "node": {
        **{"modules": ["cuda/12.8", "nccl"], "setup": ["source /shared/venv/bin/activate"]},
        **{"variables": {"NCCL_DEBUG": "WARN", "WORDS": "it's two words"}, "python": "/shared/venv/bin/python"},
    },
    "network": {"interface": "ib0", "hcas": "mlx5_0,mlx5_1", "port": 30000},
}


CASES = {
    "train": make_job(),
    "full_site": make_job(site=FULL_SITE),
    "quotes": make_job(folder='/runs/it\'s a "run" of two/launch/0001', time_limit_s=None),
    "on_cpus": make_job(gpus_per_node=0, ranks_per_node=2, site={"slurm": {"memory": None, "exclusive": False}}),
    "chain": make_job(site={"slurm": {"requeue": "chain"}}),
    "array": prepared(array=4, rounds=2),
    "pyxis": make_job(
        site={"container": {"runtime": "pyxis", "image": "ours.sqsh", "mounts": ["/data:/data", "/runs:/runs:rw"]}}
    ),
    "apptainer": make_job(site={"container": {"runtime": "apptainer", "image": "ours.sif", "mounts": ["/data:/data:ro"]}}),
    "sweep": make_job("bench", argv=("bench", "step", "--sweep", "/c.yaml", "--out", "/runs/clips")),
}


def launcher(job):
    return SlurmLauncher(job.site)


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_their_golden_files(name):
    job = CASES[name]
    assert launcher(job).problems(job) == []
    files = launcher(job).render(job)
    copied = {f: files.pop(f) for f in module._COPIED}
    assert all(text == (module.TEMPLATES / "slurm" / f).read_text() for f, text in copied.items())
    if os.environ.get("OPENSORA_GOLDEN") == "write":
        (GOLDEN / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (GOLDEN / name / file).write_text(text)
    assert files == {path.name: path.read_text() for path in (GOLDEN / name).iterdir()}


def test_every_script_is_clean_to_shellcheck():
    # What node.setup sources isn't here. The longer analysis looks at the body that is the same in all.
    whole = [*(GOLDEN / "chain").iterdir(), *(module.TEMPLATES / "slurm" / name for name in module._COPIED)]
    rest = [path for path in GOLDEN.glob("*/*") if path not in whole]
    assert len(rest) >= len(CASES)
    for given in (["--extended-analysis=false", *map(str, rest)], [*map(str, whole)]):
        found = subprocess.run([SHELLCHECK, "--exclude=SC1091", *given], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def test_a_job_is_one_call_of_sbatch_and_a_chain_or_an_array_one_of_a_script():
    assert launcher(CASES["train"]).command(CASES["train"]) == [
        *("sbatch", "--parsable", "--chdir=/runs/clips/launch/0001", "/runs/clips/launch/0001/job.sbatch")
    ]
    for name in ("chain", "array"):
        assert launcher(CASES[name]).command(CASES[name]) == ["bash", "/runs/clips/launch/0001/submit.sh"]


@pytest.mark.parametrize(
    ("site", "changes", "said"),
    [
        ({"slurm": {"options": ["--time=1"]}}, {}, "'--time=1' is set by --time"),
        ({"slurm": {"options": ["-p other"]}}, {}, "slurm.partition; leave it out there"),
        ({"slurm": {"options": ["--gres=gpu:1"]}}, {}, "--gpus-per-node and slurm.gpu_type"),
        ({"slurm": {"options": ["--sig=TERM@5"]}}, {}, "slurm.signal_s"),
        ({"slurm": {"options": ["--output=x"]}}, {}, "needs for itself; leave it out"),
        ({"slurm": {"options": ["-o x"]}}, {}, "needs for itself; leave it out"),
        ({"slurm": {"options": ["-M other"]}}, {}, "needs for itself; leave it out"),
        ({"slurm": {"options": ["--cluster=other"]}}, {}, "needs for itself; leave it out"),
        ({}, {"time_limit_s": 300}, "--time 0-00:05:00 is no more than slurm.signal_s=300"),
        ({}, {"folder": Path("/a\nb/launch/0001")}, "control characters"),
    ],
)
def test_what_slurm_cant_be_given_is_said_with_a_way_out(site, changes, said):
    job = make_job(site=site, **changes)
    problems = launcher(job).problems(job)
    assert len(problems) == 1 and said in problems[0]


def test_other_options_of_a_site_are_passed_on():
    job = make_job(
        site={"slurm": {"options": ["--reservation=x", "--exclude=node9", "--mail-type=FAIL", "-x node8", "--switches=1"]}}
    )
    assert launcher(job).problems(job) == []


@pytest.mark.parametrize("python", ["~/venv/bin/python", "$HOME/venv/bin/python"])
def test_an_interpreter_that_no_shell_would_expand_is_refused(python):
    (problem,) = site_problems(SiteConfig.model_validate({"node": {"python": python}}))
    assert problem.fields == ("node.python",) and "write the whole path" in problem.message


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("words", [("--sweep", "/c.yaml"), ("--sweep=/c.yaml",)])
def test_a_sweep_which_starts_steps_itself_is_refused_in_a_container(runtime, words):
    container = {"container": {"runtime": runtime, "image": "ours"}}
    job = make_job("bench", argv=("bench", "step", *words, "--out", "/o"), site=container)
    (problem,) = launcher(job).problems(job)
    assert f"container.runtime={runtime}" in problem and "without --sweep" in problem
    assert launcher(CASES["sweep"]).problems(CASES["sweep"]) == []
    one = make_job("bench", argv=("bench", "step", "--out", "/o"), site=container)
    assert launcher(one).problems(one) == []


@pytest.fixture
def answers(monkeypatch):
    """What Slurm's commands answer: text, or an error; and the calls of them."""
    table, calls = {}, []

    def ask(command, *, timeout_s, unsure=None):
        calls.append(list(command))
        answer = table.get(command[0], "")
        if isinstance(answer, list):  # one after the other
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "ask", ask)
    table["calls"] = calls
    return table


ASKED = make_job()


@pytest.mark.parametrize(
    ("queue", "phase"),
    [
        ("7|RUNNING|node[1-2]|1:00|None\n", Phase.RUNNING),
        ("7|PENDING||0:00|Resources\n", Phase.WAITING),
        ("7|REQUEUED||0:00|None\n", Phase.WAITING),
        ("7|COMPLETING|node1|0:00|None\n", Phase.RUNNING),
        ("7|TIMEOUT|node1|0:00|TimeLimit\n", Phase.FAILED),
        ("7|CANCELLED|node1|0:00|None\n", Phase.CANCELLED),
        ("7|COMPLETED|node1|0:00|None\n7|RUNNING|node2|0:01|None\n7|PENDING||0:00|Priority\n", Phase.RUNNING),
        ("7|COMPLETED|node1|0:00|None\n7|FAILED|node2|0:01|NonZeroExitCode\n", Phase.FAILED),
        ("7|COMPLETED|node1|0:00|None\n7|COMPLETED|node2|0:01|None\n", Phase.DONE),
    ],
)
def test_a_job_stands_where_the_queue_says_and_an_array_where_its_tasks_do(answers, queue, phase):
    answers["squeue"] = queue
    (status,) = launcher(ASKED).status(["7"])
    assert status.phase is phase and status.job_id == "7"


@pytest.mark.parametrize(
    ("accounts", "phase"),
    [
        ("7|COMPLETED\n", Phase.DONE),
        ("7|CANCELLED by 1000\n", Phase.CANCELLED),
        ("7_1|COMPLETED\n7_2|OUT_OF_MEMORY\n", Phase.FAILED),
        (LaunchError("Slurm accounting storage is disabled"), Phase.UNKNOWN),
        (LaunchError("`sacct` can't be run here (No such file or directory)"), Phase.UNKNOWN),
    ],
)
def test_a_job_that_left_the_queue_stands_where_accounts_say_and_is_unknown_without_them(answers, accounts, phase):
    answers.update(squeue=LaunchError("slurm_load_jobs error: Invalid job id specified"), sacct=accounts)
    assert [s.phase for s in launcher(ASKED).status(["7"])] == [phase]


@pytest.mark.parametrize("program", ["squeue", "sacct"])
def test_a_scheduler_that_cant_be_asked_is_no_job_that_is_gone(answers, program):
    answers[program] = LaunchError("Unable to contact slurm controller (connect failure)")
    with pytest.raises(LaunchError, match="Unable to contact"):
        launcher(ASKED).status(["7"])


def test_jobs_are_found_by_their_comment_and_only_a_chain_that_is_still_held_is_taken_back(answers):
    chain = CASES["chain"]
    answers["squeue"] = "10|Dependency|clips-0123abcd\n9|JobHeldUser|clips-0123abcd\n3|None|(null)\n"
    for found in (launcher(chain).find(chain), launcher(ASKED).settle(ASKED)):
        assert found == ["9", "10"], "to look changes nothing, and a single job is held by its user"
    assert not [call for call in answers["calls"] if call[0] == "scancel"]
    assert launcher(chain).settle(chain) == []
    assert answers["calls"][-1] == ["scancel", "10", "9"]


def test_a_job_that_came_and_went_is_found_by_what_it_wrote(answers, tmp_path):
    (tmp_path / "slurm-7.log").touch()
    (tmp_path / "slurm-8_3.log").touch()
    assert launcher(ASKED).find(replace(ASKED, folder=tmp_path)) == ["7", "8"]


def test_an_answer_without_an_id_leaves_open_what_was_submitted(answers):
    answers["sbatch"] = "sbatch: something else\n"
    with pytest.raises(UnsureError):
        launcher(ASKED).submit(ASKED)
    answers["sbatch"] = "7;cluster\n"
    assert launcher(ASKED).submit(ASKED) == ["7"]


def test_what_others_write_into_comments_is_no_answer(answers):
    answers["squeue"] = "9|None|clips-0123abcd\n3|None|a|b\n4|None|two\nlines|\n\n5\n"
    assert launcher(ASKED).find(ASKED) == ["9"]
    assert "--me" in answers["calls"][0]


def ended(answers, *job_ids):
    """The calls of scancel, in order."""
    launcher(ASKED).cancel(job_ids)
    return [c[1:] for c in answers["calls"] if c[0] == "scancel"]


TERM = ["--batch", "--signal=TERM"]


def test_the_last_of_a_chain_is_cancelled_first_and_a_run_is_told_through_its_script(answers):
    answers["squeue"] = ["7|RUNNING\n8|PENDING\n9|PENDING\n6|COMPLETED\n", "7|RUNNING\n8|CANCELLED\n9|CANCELLED\n"]
    assert ended(answers, "6", "7", "8", "9") == [["9"], ["8"], [*TERM, "7"]]


@pytest.mark.parametrize("state", ["CONFIGURING", "SUSPENDED", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "COMPLETING", "PENDING"])
def test_whatever_is_not_over_is_cancelled(answers, state):
    answers["squeue"] = [f"7|{state}\n", "7|COMPLETING\n"]
    assert ended(answers, "7") == [["7"]]


def test_tasks_of_an_array_are_cancelled_as_each_stands(answers):
    answers["squeue"] = ["7_1|COMPLETED\n7_2|RUNNING\n7_3|PENDING\n7_4|PENDING\n8|PENDING\n", "7_2|RUNNING\n"]
    assert ended(answers, "7", "8") == [["8"], ["7_3", "7_4"], [*TERM, "7_2"]]


def test_what_begins_or_is_requeued_between_a_look_and_a_call_is_cancelled_all_the_same(answers):
    answers["squeue"] = ["7|PENDING\n", "7|RUNNING\n", "7|RUNNING\n"]
    assert ended(answers, "7") == [["7"], [*TERM, "7"]]
    answers["calls"].clear()
    answers["squeue"] = ["7|RUNNING\n", "7|PENDING\n", "7|CANCELLED\n"]
    answers["scancel"] = [LaunchError("Kill job error on job id 7: Job is pending execution"), ""]
    assert ended(answers, "7") == [[*TERM, "7"], ["7"]]


def test_what_cant_be_cancelled_is_said(answers):
    answers.update(squeue="8|PENDING\n7|CANCELLED\n", scancel=LaunchError("Access/permission denied"))
    with pytest.raises(LaunchError, match=r"still there: job 8 \(PENDING\)") as caught:
        launcher(ASKED).cancel(["7", "8"])
    assert "permission denied" in str(caught.value.__cause__)


def test_logs_are_those_of_rank_0_of_the_newest_restart(tmp_path):
    job = replace(ASKED, run_dir=tmp_path, folder=tmp_path / "launch/0001")
    job.folder.mkdir(parents=True)
    with pytest.raises(LaunchError, match="has written nothing yet"):
        launcher(job).logs(job, ["9", "10"], follow=False)
    (job.folder / "slurm-9.log").touch()
    assert launcher(job).logs(job, ["9", "10"], follow=False) == job.folder / "slurm-9.log"
    for attempt in ("10.0", "9.1", "9.0", "99.0"):
        log = tmp_path / "logs" / attempt / "node-0/rank-0.log"
        log.parent.mkdir(parents=True)
        log.touch()
    assert launcher(job).logs(job, ["9"], follow=False).parts[-3] == "9.1"
    assert launcher(job).logs(job, ["9", "10"], follow=True).parts[-3] == "10.0"
