"""What a batch script does about each thing that can happen to it.

Its neighbours are stand-ins that note how they are called; tests/slurm has the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from slurm_jobs import make_job, prepared

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch import slurm as module
from opensora_dist.launch.slurm import SlurmLauncher

# The neighbours of a batch script: each notes how it is called, and answers as a test has it.
_STAND_IN = r"""#!/bin/bash
name=${0##*/}
echo "$name $*" >> "$STAND/calls"
answer() { if [ -e "$STAND/$1" ]; then cat "$STAND/$1"; else echo "${2-}"; fi; }
held() { while [ -e "$STAND/hold_$1" ]; do /bin/sleep 0.02; done; }
case "$name $*" in
  "scontrol show hostnames"*) answer nodes "node1" ;;
  "scontrol --oneliner show job"*) answer job "JobState=RUNNING Reason=None ExcNodeList=(null) PreemptTime=None" ;;
  "scontrol requeue"*) kill -TERM "$PPID" ;;
  "scancel --signal"*) touch "$STAND/told" ;;
  "squeue "*"--states=PENDING"*) answer pending ;;
  "sbatch "*) [ ! -e "$STAND/refuse" ] || exit 1; echo 99 ;;
  "getent "*) answer address "10.0.0.1 STREAM $3" ;;
  "sleep "*) exec /bin/sleep 0.05 ;;
  "srun "*"torch.distributed.run"* | "srun "*"data prepare"*)
    while [ -e "$STAND/hold" ] && [ ! -e "$STAND/told" ]; do /bin/sleep 0.02; done
    exit "$(answer step 0)" ;;
  "srun "*"--immediate=60 true") exit "$(answer first 0)" ;;
  "srun "*"node links"*) exit "$(answer links 0)" ;;
  "python "*"node begin"*) held begin; exit "$(answer begin 0)" ;;
  "python "*"node end"*) held end; exit "$(answer end 0)" ;;
  "python "*"node verdict"*) answer unfit; exit "$(answer verdict 0)" ;;
esac
"""


# A clock that is a second later whenever it is asked, in the test that has a time of its own.
DATE = r"""
[ -e "$STAND/date" ] || exec /bin/date "$@"
now=$(($(cat "$STAND/date") + 1))
echo "$now" > "$STAND/date"
echo "$now"
"""


class Stand:
    """A batch script of a job, and its neighbours."""

    def __init__(self, tmp_path, job):
        self._folder = tmp_path / "stand"
        (self._folder / "bin").mkdir(parents=True)
        for name in ["scontrol", "scancel", "squeue", "sbatch", "srun", "getent", "sleep", "python"]:
            (self._folder / "bin" / name).write_text(_STAND_IN)
            (self._folder / "bin" / name).chmod(0o755)
        job.folder.mkdir(parents=True)
        for name, text in SlurmLauncher(job.site).render(job).items():
            (job.folder / name).write_text(text)
        self._script = job.folder / "job.sbatch"

    def set(self, **answers):
        for name, text in answers.items():
            (self._folder / name).write_text(str(text))

    def start(self, *args, nodes=1, **more):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_RESTART_COUNT": "1"}
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}"
        with (self._folder / "said").open("wb") as said:
            return subprocess.Popen(
                ["bash", str(self._script), *args],
                env={"PATH": path, "STAND": str(self._folder), **slurm, **more},
                stdout=said,
                stderr=said,
            )

    def run(self, *args, **more):
        """Its exit code."""
        return self.start(*args, **more).wait(timeout=20)

    def calls(self, start):
        """Of a program, in order; but the step that does nothing, which each start but the first begins with."""
        path = self._folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(start) and not line.endswith("--immediate=60 true")]

    def said(self):
        return (self._folder / "said").read_text()

    def until(self, called="torch.distributed.run"):
        until = time.monotonic() + 20
        while not any(called in call for call in self.calls("")):
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)

    def go_on(self, held):
        (self._folder / f"hold_{held}").unlink()


def stand(tmp_path, job=None, **site):
    values = {"node": {"python": "python"}, "preflight": {"enabled": False}, **site}
    job = job or make_job(gpus_per_node=0, ranks_per_node=2)
    folder = tmp_path / "it's a run/launch/0001"
    return Stand(tmp_path, replace(job, folder=folder, run_dir=folder.parent.parent, site=SiteConfig.model_validate(values)))


def test_a_run_that_is_done_ends_well(tmp_path):
    job = stand(tmp_path)
    assert job.run(nodes=2) == 0
    (training,) = job.calls("srun")
    assert "--nodes=2 --ntasks=2" in training and "--master-addr=10.0.0.1 --master-port=29507" in training
    assert job.calls("python")[-1].endswith("--attempt 7.1 --code 0") and not job.calls("scontrol requeue")


@pytest.mark.parametrize(("begin", "code"), [(20, 0), (21, 1)])
def test_where_nothing_is_left_to_do_or_another_start_is_of_no_use_nothing_starts(tmp_path, begin, code):
    job = stand(tmp_path)
    job.set(begin=begin)
    assert job.run() == code and not job.calls("srun")


def test_a_job_that_is_started_again_and_can_make_no_step_is_started_once_more(tmp_path):
    job = stand(tmp_path)
    job.set(first=1, end=10)
    assert job.run(nodes=2) == -signal.SIGTERM and not job.calls("srun")
    assert job.calls("python")[-1].endswith("--attempt 7.1 --code 1") and job.calls("scontrol requeue")
    first = stand(tmp_path / "first start")
    first.set(first=1)
    assert first.run(nodes=2, SLURM_RESTART_COUNT="0") == 0, "nothing can have been taken from it yet"


def test_a_program_that_isnt_there_is_no_run_that_is_done(tmp_path):
    job = stand(tmp_path)
    job.set(step=127, end=11)
    assert job.run() == 1 and job.calls("python")[-1].endswith("--attempt 7.1 --code 127")
    job = stand(tmp_path / "other", node={"python": str(tmp_path / "nowhere/python")})
    assert job.run() == 1 and not job.calls("srun"), "not even begun"


# What fails while it is asked is no failure of the run: the next begin looks again.
@pytest.mark.parametrize(("end", "requeued"), [(10, True), (11, False), (12, False), (1, True), (2, True), (127, True)])
def test_a_job_is_requeued_where_the_end_of_its_attempt_says_so_and_never_else(tmp_path, end, requeued):
    job = stand(tmp_path)
    job.set(step=1, end=end)
    code = job.run()
    assert bool(job.calls("scontrol requeue 7")) == requeued
    assert code == (-signal.SIGTERM if requeued else {11: 1, 12: 0}[end])
    assert "--stopped-by" not in job.calls("python")[-1], "nobody asked"


def test_before_the_time_limit_ranks_are_told_and_the_job_is_requeued(tmp_path):
    job = stand(tmp_path)
    job.set(hold="", end=10)
    script = job.start()
    job.until()
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=20) == -signal.SIGTERM  # as Slurm takes a requeued job down
    assert job.calls("scancel")[0] == "scancel --signal=USR1 7" and job.calls("scontrol requeue 7")
    assert job.calls("python")[-1].endswith("--stopped-by scheduler --code 0")


@pytest.mark.parametrize(
    ("why", "who", "end", "requeued", "code"),
    [
        ("Reason=None PreemptTime=None", "user", 12, False, 0),
        ("Reason=None PreemptTime=None", "user", 10, False, 10),
        ("Reason=None PreemptTime=2026-01-01T00:00:00", "scheduler", 10, False, 10),  # Slurm starts it again by itself
        ("Reason=TimeLimit PreemptTime=None", "scheduler", 10, True, -signal.SIGTERM),
    ],
)
def test_a_job_that_is_ended_saves_and_is_requeued_where_its_time_is_up_alone(tmp_path, why, who, end, requeued, code):
    job = stand(tmp_path)
    job.set(hold="", end=end, job=why)
    script = job.start()
    job.until()
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=20) == code
    assert job.calls("scancel")[0] == "scancel --signal=TERM 7" and bool(job.calls("scontrol requeue")) == requeued
    assert job.calls("python")[-1].endswith(f"--stopped-by {who} --code 0")


def test_what_tells_how_a_job_ended_is_not_stopped_itself(tmp_path):
    job = stand(tmp_path)
    job.set(hold_end="")
    script = job.start()
    job.until("node end")
    script.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    job.go_on("end")
    assert script.wait(timeout=20) == 0 and "asked to stop" in job.said() and not job.calls("scancel")


def test_a_job_with_nothing_left_to_do_is_over_though_it_is_told_to_stop(tmp_path):
    job = stand(tmp_path)
    job.set(hold_begin="", begin=20)
    script = job.start()
    job.until("node begin")
    script.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    job.go_on("begin")
    assert script.wait(timeout=20) == 0 and not any("node end" in call for call in job.calls("python"))


def test_told_to_stop_while_it_sets_up_a_job_saves_its_place(tmp_path):
    waits = 'echo setting up >> "$STAND/calls"; while [ -e "$STAND/hold_setup" ]; do sleep 1; done'
    job = stand(tmp_path, node={"python": "python", "setup": [waits]})
    job.set(hold_setup="", end=10)
    script = job.start()
    job.until("setting up")
    script.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    job.go_on("setup")
    assert script.wait(timeout=20) == -signal.SIGTERM and not job.calls("srun")
    assert job.calls("python")[-1].endswith("--stopped-by scheduler --code 1") and job.calls("scontrol requeue 7")


@pytest.mark.parametrize(
    ("told", "site", "known"),
    [
        (signal.SIGUSR1, {"slurm": {"signal_s": 30}}, {"job": f"Reason=None EndTime={time.strftime('%Y-%m-%dT%H:%M:%S')}"}),
        (signal.SIGTERM, {"slurm": {"signal_s": 10}}, {"date": "100", "job": "Reason=None PreemptTime=None"}),
    ],
)
def test_ranks_that_dont_stop_in_time_are_killed_and_the_job_ends_as_its_attempt_does(tmp_path, told, site, known):
    job = stand(tmp_path, **site)
    job.set(hold="", end=10 if told == signal.SIGUSR1 else 12, step=1, **known)
    (tmp_path / "stand/bin/date").write_text("#!/bin/bash\n" + DATE)
    (tmp_path / "stand/bin/date").chmod(0o755)
    (tmp_path / "stand/bin/scancel").write_text(_STAND_IN.replace('"scancel --signal"*', '"scancel 7.2"'))
    steps = '"squeue "*) printf "7.batch\\n7.2\\n"'
    (tmp_path / "stand/bin/squeue").write_text(_STAND_IN.replace('"squeue "*"--states=PENDING"*) answer pending', steps))
    script = job.start()
    job.until()
    script.send_signal(told)
    assert script.wait(timeout=20) == (-signal.SIGTERM if told == signal.SIGUSR1 else 0)
    assert job.calls("scancel")[-1] == "scancel 7.2"
    assert all(call == f"scancel --signal={told.name[3:]} 7" for call in job.calls("scancel")[:-1])


@pytest.mark.parametrize("address", ["127.0.1.1 STREAM node1", ""])
def test_a_head_that_others_cant_reach_is_refused_and_the_job_not_started_again(tmp_path, address):
    job = stand(tmp_path)
    job.set(address=address, end=11)
    assert job.run(nodes=2) == 1 and "mend its name in /etc/hosts or DNS" in job.said()
    assert not job.calls("srun") and job.calls("python")[-1].endswith("--code 2")


def test_a_node_alone_need_not_be_reached(tmp_path):
    job = stand(tmp_path)
    job.set(address="127.0.1.1 STREAM node1")
    assert job.run() == 0 and "--master-addr=127.0.0.1" in job.calls("srun")[0]


def test_unfit_nodes_are_left_out_by_another_job_beside_those_that_were_before(tmp_path):
    job = stand(tmp_path, preflight={})
    job.set(verdict=30, unfit="node2,node5", job="Reason=None ExcNodeList=node[7-8] PreemptTime=None", nodes="node1\nnode2")
    assert job.run(nodes=2) == 1
    folder = tmp_path / "it's a run/launch/0001"
    assert job.calls("sbatch") == [f"sbatch --parsable --chdir={folder} --exclude=node[7-8],node2,node5 {folder}/job.sbatch"]
    assert job.calls("python")[-1].endswith("node resubmitted " + f"{folder} 99")
    assert not any("torch.distributed.run" in call for call in job.calls("srun"))
    assert job.calls("python")[1].endswith("--attempt 7.1 node1 node2")


def test_where_no_other_nodes_can_be_asked_for_the_job_fails(tmp_path):
    job = stand(tmp_path, preflight={})
    job.set(verdict=30, unfit="node2", refuse="", end=11)
    assert job.run(nodes=2) == 1 and job.calls("python")[-1].endswith("--code 30")


def test_where_no_node_can_be_blamed_the_job_fails(tmp_path):
    job = stand(tmp_path, preflight={})
    job.set(verdict=31, end=11)
    assert job.run(nodes=2) == 1 and job.calls("python")[-1].endswith("--code 31") and not job.calls("sbatch")


def test_links_that_fail_before_they_could_be_tried_are_nobodys_and_the_job_fails(tmp_path):
    job = stand(tmp_path, preflight={})
    job.set(links=1, verdict=0, end=11)
    assert job.run(nodes=2) == 1 and job.calls("python")[-1].endswith("--code 31")
    assert "could not be tried (exit code 1)" in job.said() and len(job.calls("srun")) == 2


CHAIN = {"slurm": {"requeue": "chain"}}
PENDING = "8 clips-0123abcd\n9 clips-0123abcd\n10 other-00000000\n"
TAKEN_BACK = ["scancel 9", "scancel 8"]


@pytest.mark.parametrize(
    ("begin", "end", "code", "taken_back"),
    [(0, 0, 0, True), (0, 11, 1, True), (20, 0, 0, True), (21, 0, 1, True), (0, 10, 10, False)],
)
def test_the_rest_of_a_chain_is_taken_back_but_where_the_run_is_to_go_on(tmp_path, begin, end, code, taken_back):
    job = stand(tmp_path, **CHAIN)
    job.set(begin=begin, end=end, pending=PENDING)
    assert job.run() == code
    assert job.calls("scancel") == (TAKEN_BACK if taken_back else []) and not job.calls("scontrol requeue")


@pytest.mark.parametrize(("preempted", "taken_back"), [("None", True), ("2026-01-01T00:00:00", False)])
def test_cancelled_by_a_user_a_job_takes_the_rest_of_its_chain_back_before_anything_else(tmp_path, preempted, taken_back):
    job = stand(tmp_path, **CHAIN)
    job.set(hold="", end=12 if taken_back else 10, pending=PENDING, job=f"Reason=None PreemptTime={preempted}")
    script = job.start()
    job.until()
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=20) == (0 if taken_back else 10)
    before = [call for call in job.calls("") if "scancel" in call or "node end" in call]
    before = before[: next(i for i, call in enumerate(before) if "node end" in call)]
    assert [call for call in before if "--signal" not in call] == (TAKEN_BACK if taken_back else [])


@pytest.mark.parametrize(
    ("lines", "taken_back"),
    [
        ({"modules": ["nowhere"]}, TAKEN_BACK),
        ({"setup": ["false || exit 1"]}, TAKEN_BACK),
        ({"setup": ["kill -TERM $$", "exit 1"]}, []),  # by another job, which ends what the setup was waiting for
    ],
)
def test_what_cant_be_set_up_ends_the_chain_but_where_another_job_ended_it(tmp_path, lines, taken_back):
    job = stand(tmp_path, **CHAIN, node={"python": "python", **lines})
    job.set(pending=PENDING, job="Reason=None PreemptTime=2026-01-01T00:00:00")
    assert job.run() == 1 and not job.calls("python")
    assert [call for call in job.calls("scancel") if "--signal" not in call] == taken_back


@pytest.mark.parametrize("script", ["job.sbatch", "last.sbatch"])
def test_an_array_is_no_chain_and_takes_nothing_back(tmp_path, script):
    job = stand(tmp_path, prepared(array=4, rounds=2), **CHAIN)
    job._script = job._script.with_name(script)
    job.set(pending=PENDING, end=11)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"} if script == "job.sbatch" else {}
    assert job.run("1", **array) == 1 and not job.calls("scancel") and not job.calls("scontrol requeue")


def test_the_rest_of_a_chain_goes_on_without_unfit_nodes(tmp_path):
    job = stand(tmp_path, **CHAIN, preflight={})
    job.set(verdict=30, unfit="node2", pending=PENDING)
    assert job.run(nodes=2) == 1 and not job.calls("sbatch")
    assert sorted(job.calls("scontrol update")) == [f"scontrol update JobId={i} ExcNodeList=node2" for i in (8, 9)]
    assert job.calls("python")[-1].endswith(" 8")


def test_a_task_of_an_array_is_told_by_its_own_id_and_does_its_own_part(tmp_path):
    job = stand(tmp_path, prepared(array=4, rounds=2))
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.run("2", **array) == 0
    assert job.calls("srun")[0].endswith("data prepare /c.yaml --part 3/4")
    assert job.calls("python")[-1].endswith("--attempt 7_3.1 --task 7 --code 0")


def test_a_chain_is_held_until_all_of_it_is_there_and_taken_back_where_it_isnt(tmp_path):
    job = stand(tmp_path, **CHAIN)
    submit = job._script.with_name("submit.sh")
    path = {"PATH": f"{tmp_path / 'stand/bin'}:{os.environ['PATH']}", "STAND": str(tmp_path / "stand")}
    done = subprocess.run(["bash", str(submit)], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["99"] * 3
    assert "--hold" in job.calls("sbatch")[0] and "--dependency=afternotok:99" in job.calls("sbatch")[2]
    assert job.calls("scontrol") == ["scontrol release 99"]
    (tmp_path / "stand/bin/sbatch").write_text(
        '#!/bin/bash\ncase "$*" in *--hold*) echo 5 ;; *afternotok:5*) echo 6 ;; *) exit 1 ;; esac'
    )
    done = subprocess.run(["bash", str(submit)], env=path, capture_output=True, text=True)
    assert done.returncode and not done.stdout and job.calls("scancel") == ["scancel 6", "scancel 5"]


@pytest.mark.parametrize(("nodes", "told", "said"), [(2, None, "eth7"), (2, "ib0", "ib0"), (1, None, "none")])
def test_gloo_is_told_the_interface_that_leads_to_the_first_node_where_the_site_names_none(tmp_path, nodes, told, said):
    (tmp_path / "ip").write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        '  "-o route get 10.0.0.1") echo "10.0.0.1 dev eth7 src 10.0.0.2 uid 0 \\    cache" ;;\n'
        '  "-o -4 address show to 10.0.0.2") echo "2: eth7    inet 10.0.0.2/24 scope global eth7" ;;\n'
        "esac\n"
    )
    (tmp_path / "ip").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_ADDR": "10.0.0.1", "SLURM_JOB_NUM_NODES": str(nodes)}
    env |= {"GLOO_SOCKET_IFNAME": told} if told else {}
    script = ["bash", str(module.TEMPLATES / "slurm/network.sh"), "bash", "-c", 'echo "${GLOO_SOCKET_IFNAME:-none}"']
    assert subprocess.run(script, env=env, capture_output=True, text=True, check=True).stdout.strip() == said
