"""What is submitted: checked for the machines it will have, written down, and never twice."""

from __future__ import annotations

import json
import os
import shlex
import signal

import pytest
from dataset_factory import write_dataset
from fake_schedulers import LOST, REFUSED, UNREACHABLE, Scheduler
from training import SAMPLES, overrides

from opensora_dist.cli.main import main
from opensora_dist.cli.submit import parse_command
from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.io import exclusive_lock
from opensora_dist.launch import slurm as slurm_launcher
from opensora_dist.launch.records import read_records
from opensora_dist.recipes import checks
from opensora_dist.recipes import submit as submitting
from opensora_dist.resilience.attempts import ATTEMPTS_NAME, Attempt, Next, Outcome, append_line, begin_line, end_line

SUBMIT = ["submit", "--backend", "slurm", "--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "2"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submitted") / "data"
    write_dataset(folder, samples=SAMPLES)
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    found = Scheduler("slurm", tmp_path / "scheduler")
    monkeypatch.setenv("PATH", f"{found.path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("OPENSORA_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def train(data, tmp_path):
    """A command that can be submitted."""
    return ["train", *overrides(data, tmp_path / "run")]


def submit(capsys, *words):
    """Exit code, and what was said."""
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def folder_of(run_dir, number=1):
    return run_dir / "launch" / f"{number:04d}"


# --- what is submitted


def test_what_was_submitted_is_kept_with_its_config_its_commit_and_the_answer(capsys, slurm, train, tmp_path):
    code, out, _ = submit(capsys, *SUBMIT, "--time", "01:00:00", "--", *train)
    (record,) = read_records(tmp_path / "run")
    assert (code, record.job_ids, record.backend) == (0, ("1",), "slurm")
    assert "slurm job 1" in out and str(folder_of(tmp_path / "run")) in out
    assert record.git is None or len(record.git["commit"]) == 40
    assert record.job.argv == ("train", str(folder_of(tmp_path / "run") / "config.yaml"))
    assert (record.job.nodes, record.job.world, record.job.time_limit_s, record.job.name) == (2, 4, 3600, "run")
    assert slurm.jobs == [{"id": "1", "key": record.job.id, "state": "waiting"}]
    config = load_config(TrainConfig, record.job.config)
    assert (config.data.global_batch, config.run.dir) == (4, str(tmp_path / "run"))


def test_a_dry_run_shows_every_file_and_asks_nobody(capsys, slurm, train, tmp_path):
    slurm.mode = "unreachable"
    code, shown, _ = submit(capsys, *SUBMIT, "--dry-run", "--", *train)
    assert code == 0 and not (tmp_path / "run").exists() and not slurm.jobs
    slurm.mode = "up"
    submit(capsys, *SUBMIT, "--", *train)
    (record,) = read_records(tmp_path / "run")
    shown_id = next(w for w in shown.replace("=", " ").split() if w.startswith("run-") and len(w) == len(record.job.id))
    files = [p for p in record.job.folder.iterdir() if p.name != "submission.json"]
    assert len(files) > 1
    for path in files:  # ids are drawn anew
        assert f"# {path}\n{path.read_text().rstrip()}".replace(record.job.id, shown_id) in shown
    assert shown.endswith(f"# submitted by\nsbatch --parsable --chdir={record.job.folder} {record.job.folder}/job.sbatch\n")


def test_the_resolved_config_depends_on_no_place_and_on_no_driver(capsys, slurm, data, train, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    relative = [word.replace(f"{data}", "data").replace(f"{tmp_path}/", "") for word in train if "run.device" not in word]
    monkeypatch.setenv("CACHE", "elsewhere")
    for name, gpus, device in (("cpus", "0", "cpu"), ("gpus", "4", "cuda")):
        words = [
            "submit",
            "--backend",
            "slurm",
            "--gpus-per-node",
            gpus,
            "--",
            *relative,
            f"run.dir={name}",
            "data.cache.path=$CACHE/x",
        ]
        assert submit(capsys, *words)[0] == 0
        config = load_config(TrainConfig, folder_of(data.parent / name) / "config.yaml")
        assert config.run.device == device
        assert (config.data.path, config.run.dir, config.data.cache.path) == (str(data), str(data.parent / name), "$CACHE/x")


def test_records_lie_where_they_are_wanted(capsys, slurm, train, tmp_path):
    assert submit(capsys, *SUBMIT, "--records", tmp_path / "kept", "--", *train)[0] == 0
    (record,) = read_records(tmp_path / "kept")
    assert record.job.folder == folder_of(tmp_path / "kept") and record.job.run_dir == tmp_path / "run"
    assert not (tmp_path / "run").exists()
    assert submit(capsys, "status", tmp_path / "kept")[0] == 0


def test_a_preparation_is_submitted_in_parts_with_rounds_for_its_duplicates(capsys, slurm, tmp_path):
    (tmp_path / "videos").mkdir()
    words = ["data", "prepare", "input.path=videos", "output.path=shards"]
    base = ["submit", "--backend", "slurm", "--gpus-per-node", "0"]
    assert submit(capsys, *base, "--array", "3", "--", *words, "filter.duplicates=4")[0] == 0
    (record,) = read_records(tmp_path / "shards")
    config = str(record.job.config)
    assert (record.job.kind, record.job.array, record.job.rounds) == ("prepare", 3, 2)
    assert record.job.argv == ("data", "prepare", config) and f"path: {tmp_path}/videos" in record.job.config.read_text()
    part = tmp_path / "shards/launch/part-2-of-8"
    assert submit(capsys, *base, "--", *words, "--part", "2/8")[0] == 0
    assert read_records(part)[0].job.argv == ("data", "prepare", "--part", "2/8", str(folder_of(part) / "config.yaml"))


def test_a_benchmark_is_submitted_with_its_own_words(capsys, slurm, tmp_path):
    words = ["bench", "sequence", "--nproc", "2", "--out", "figures"]
    assert submit(capsys, "submit", "--backend", "slurm", "--gpus-per-node", "8", "--", *words)[0] == 0
    (record,) = read_records(tmp_path / "figures")
    assert record.job.argv == (*words[:-1], str(tmp_path / "figures")) and record.job.config is None
    code, _, err = submit(capsys, "submit", "--backend", "slurm", "--gpus-per-node", "8", "--", *words[:-2])
    assert code == 2 and "add --out DIR" in err


def test_the_command_may_come_without_dashes_and_its_options_are_its_own(capsys, slurm, train, tmp_path):
    assert submit(capsys, *SUBMIT, "--dry-run", *train)[0] == 0
    code, _, err = submit(capsys, *SUBMIT, *train, "--nodes", "3")
    assert code == 2 and "unrecognized arguments: --nodes 3; options of `submit` come before the command" in err
    assert parse_command(["data", "prepare", "c.yaml", "--part", "1/2"]).part == "1/2"


# --- what can't be


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "no command is given"),
        (["sample", "x"], "invalid choice: 'sample'"),
        (["data", "toy", "x"], "`data toy` can't be submitted"),
        (["data", "prepare", "--part", "9/8"], "--part '9/8'"),
        (["train", "nowhere.yaml"], "config 'nowhere.yaml' does not exist"),
    ],
)
def test_what_is_no_command_is_refused(capsys, slurm, words, said):
    code, _, err = submit(capsys, *SUBMIT, "--", *words)
    assert code == 2 and said in err and not slurm.jobs


def test_problems_of_options_site_config_and_scheduler_are_said_at_once(capsys, slurm, train, tmp_path):
    (tmp_path / "site.yaml").write_text("slurm: {partition: 'a b', memry: 3}\nnode: {variables: {HF_TOKEN: hf_x}}\n")
    options = [
        "--nodes",
        "0",
        "--gpus-per-node",
        "8",
        "--time",
        "1h",
        "--name",
        "it's",
        "--max-requeues",
        "-1",
        "--site",
        "site.yaml",
    ]
    mistakes = ["run.stps=3", "run.device=cpu", "parallel.max_restarts=2", "parallel.sp.degree=3"]
    code, _, err = submit(capsys, "submit", "--backend", "slurm", *options, "--", *train, *mistakes)
    assert code == 2
    for said in (
        "site.yaml: slurm.memry=3: unknown key; did you mean 'memory'?",
        "site.yaml: slurm.partition='a b' holds a space",
        "site.yaml: node.variables.HF_TOKEN looks like a secret",
        "--nodes must be 1 or more, and is 0",
        "--max-requeues must be 0 or more, and is -1",
        "--time '1h' is not HH:MM:SS",
        '--name "it\'s"',
        "run.stps=3: unknown key",
        "run.device=cpu with --gpus-per-node 8",
        "use --max-requeues=2",
        "parallel.sp.degree=3 must divide the 8 ranks",
    ):
        assert said in err
    assert "hf_x" not in err and not (tmp_path / "run").exists()


def test_the_config_is_held_against_the_world_that_will_run(capsys, slurm, train):
    assert submit(capsys, *SUBMIT, "--dry-run", "--", *train, "parallel.sp.degree=2")[0] == 0
    code, _, err = submit(capsys, *SUBMIT, "--", *train, "data.global_batch=6")
    assert code == 2 and "data.global_batch=6 must be a multiple of data ranks x parallel.grad_accum = 4 x 1 = 4" in err


def test_the_data_set_is_opened_where_it_can_be(capsys, slurm, train, tmp_path):
    code, _, err = submit(capsys, *SUBMIT, "--", *train, "model.patch=[1,3,2]")
    assert code == 2 and "model.patch" in err and "clips of" in err
    code, _, err = submit(capsys, *SUBMIT, "--dry-run", "--", *train, "data.path=/scratch/nowhere")
    assert code == 0 and "perhaps no problem there: data.path='/scratch/nowhere' is not a folder" in err


def test_a_store_that_is_not_reached_from_here_is_a_warning(capsys, slurm, train, monkeypatch):
    monkeypatch.setattr(checks, "_ASKING_S", 0.1)
    for url, said in (("http://127.0.0.1:9/x", "127.0.0.1:9/x"), ("http://127.0.0.1:9/x-{0..3}.tar", "tars without an index")):
        code, _, err = submit(capsys, *SUBMIT, "--dry-run", "--", *train, f"data.path={url}")
        assert code == 0 and said in err and "isn't known before the run starts" in err


def test_a_gpu_and_packages_are_wanted_where_it_runs(capsys, slurm, train, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = [word for word in train if word != "run.device=cpu"]
    more = ["run.device=cuda", "track.wandb.mode=online"]
    code, _, err = submit(
        capsys, "submit", "--backend", "slurm", "--gpus-per-node", "8", "--dry-run", "--", *words, *more, "data.global_batch=8"
    )
    assert code == 0 and "perhaps no problem there: track.wandb.mode=online needs WANDB_API_KEY" in err
    code, _, err = submit(capsys, *SUBMIT, "--", *words, "run.device=cuda")
    assert code == 2 and "run.device=cuda with --gpus-per-node 0" in err


def test_a_secret_is_in_no_file(capsys, slurm, train, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    code, _, err = submit(capsys, *SUBMIT, "--", *train, "data.path=https://me:s3cr3t@example.com/x")
    assert code == 2 and "s3cr3t" not in err
    assert submit(capsys, *SUBMIT, "--", *train, "track.wandb.mode=online")[0] == 0
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"s3cr3t" in p.read_bytes()]


# --- nothing twice


def test_a_run_that_is_submitted_is_refused_until_it_is_over(capsys, slurm, train, tmp_path):
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 0
    for state in ("waiting", "running"):
        slurm.end(state)
        code, _, err = submit(capsys, *SUBMIT, "--", *train)
        assert code == 2 and f"slurm job 1 ({state})" in err and f"opensora-dist cancel {tmp_path}/run" in err
    assert len(slurm.jobs) == 1 and not folder_of(tmp_path / "run", 2).exists()
    slurm.end("failed")
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 0
    assert [r.job_ids for r in read_records(tmp_path / "run")] == [("1",), ("2",)]


@pytest.mark.parametrize("mode", ["dies", "lost"])
def test_a_submission_whose_answer_is_lost_is_found_and_not_made_again(capsys, slurm, train, tmp_path, mode):
    slurm.mode = mode
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 1 and "The same command again asks for it first" in err
    assert (LOST["slurm"] in err) == (mode == "lost")
    slurm.mode = "up"
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 2 and "slurm job 1 (waiting)" in err and len(slurm.jobs) == 1
    assert read_records(tmp_path / "run")[0].job_ids == ("1",)


def test_a_scheduler_that_hangs_is_given_up_and_asked_before_anything_is_submitted_again(
    capsys, slurm, train, tmp_path, monkeypatch
):
    (tmp_path / "site.yaml").write_text("slurm: {command_timeout_s: 77}\n")
    slurm.mode = "hangs"
    hasty = [*SUBMIT, "--site", "site.yaml", "--", *train]
    given = []

    def ask(command, *, timeout_s, **more):
        # Time is short for what hangs alone: a busy machine may take long to start what answers.
        given.append(timeout_s)
        return real(command, timeout_s=0.2 if command[0] == "sbatch" else timeout_s, **more)

    real = slurm_launcher.ask
    with monkeypatch.context() as patched:
        patched.setattr(slurm_launcher, "ask", ask)
        code, _, err = submit(capsys, *hasty)
    assert code == 1 and "gave no answer within" in err and given[-1] % 77 == 0
    slurm.mode = "up"
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 1 and "may still arrive: try again in" in err and not slurm.jobs
    monkeypatch.setattr(submitting, "_LATE_S", 0.0)
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 0
    assert [r.job_ids for r in read_records(tmp_path / "run")] == [(), ("1",)]


def test_what_is_being_submitted_is_left_alone_and_only_submit_notes_an_answer_that_was_lost(capsys, slurm, train, tmp_path):
    run = tmp_path / "run"
    slurm.mode = "lost"
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 1
    slurm.mode = "up"
    with exclusive_lock(run / "launch/.lock", busy=AssertionError):
        for verb in ("status", "logs", "cancel"):
            code, _, err = submit(capsys, verb, run)
            assert code == 2 and "is being made" in err
    assert slurm.jobs[0]["state"] == "waiting"
    assert "job 1: waiting" in submit(capsys, "status", run)[1]
    assert read_records(run)[0].job_ids is None
    assert submit(capsys, "cancel", run)[1] == "cancelled 1\n" and slurm.jobs[0]["state"] == "cancelled"


def test_a_job_that_was_never_noted_is_seen_refused_and_cancelled(capsys, slurm, train, tmp_path):
    """The one that went on without unfit nodes, where the script that asked for it ended before it could say so."""
    submit(capsys, *SUBMIT, "--", *train)
    slurm.end("failed")
    slurm.set_jobs([*slurm.jobs, {**slurm.jobs[0], "id": "2", "state": "running"}])
    assert "job 2: running" in submit(capsys, "status", tmp_path / "run")[1]
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 2 and "slurm job 2 (running)" in err and len(slurm.jobs) == 2
    assert submit(capsys, "cancel", tmp_path / "run")[1] == "cancelled 2\n"
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 0


def test_who_submits_may_be_killed_before_it_hears_the_answer(slurm, train, tmp_path, capsys):
    slurm.mode = "kills"
    child = os.fork()
    if child == 0:  # it is killed by the scheduler's command, which is its child
        main([*SUBMIT, "--", *train])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read_records(tmp_path / "run")[0].job_ids is None
    slurm.mode = "unreachable"
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 1 and UNREACHABLE["slurm"] in err
    slurm.mode = "up"
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 2 and "slurm job 1 (waiting)" in err and len(slurm.jobs) == 1


def test_two_calls_at_once_submit_one_job(capsys, slurm, train, tmp_path):
    with exclusive_lock(tmp_path / "run/launch/.lock", busy=AssertionError):
        code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 2 and "is being made" in err and not slurm.jobs


@pytest.mark.parametrize("mode, said", [("unreachable", UNREACHABLE["slurm"]), ("refuses", REFUSED["slurm"])])
def test_what_was_refused_stands_in_nobodys_way(capsys, slurm, train, tmp_path, mode, said):
    slurm.mode = mode
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 1 and said in err and not slurm.jobs
    assert submit(capsys, "logs", tmp_path / "run")[0] == 2
    assert "refused, or never arrived" in submit(capsys, "status", tmp_path / "run")[1]
    slurm.mode = "up"
    assert submit(capsys, *SUBMIT, "--", *train)[0] == 0
    assert [r.job_ids for r in read_records(tmp_path / "run")] == [(), ("1",)]


def test_a_missing_partition_is_said_with_those_that_there_are(capsys, slurm, train, tmp_path):
    (tmp_path / "site.yaml").write_text("slurm: {partition: nix}\n")
    slurm.mode = "refuses"
    code, _, err = submit(capsys, *SUBMIT, "--site", "site.yaml", "--", *train)
    assert code == 1 and REFUSED["slurm"] in err
    assert "slurm.partition" in err and "batch, urgent" in err


def test_a_machine_without_slurm_is_told_so(capsys, train, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = submit(capsys, *SUBMIT, "--", *train)
    assert code == 1 and "`sbatch` can't be run here" in err and "on its PATH" in err


# --- afterwards


def test_status_logs_and_cancel_know_what_was_submitted(capfd, slurm, train, tmp_path):
    run = tmp_path / "run"
    for verb in ("status", "logs", "cancel"):
        code, _, err = submit(capfd, verb, run)
        assert code == 2 and "holds no submission" in err
    submit(capfd, *SUBMIT, "--", *train)
    code, out, _ = submit(capfd, "status", run)
    assert code == 0 and "job 1: waiting (PENDING" in out
    code, out, _ = submit(capfd, "status", run, "--json")
    assert json.loads(out)["jobs"][0] | {"said": ""} == {"job_id": "1", "phase": "waiting", "said": ""}
    first = Attempt(name="1.0", began=0, ended=40, outcome=Outcome(next=Next.AGAIN, why="asked to stop"))
    second = Attempt(name="1.1", began=40)
    for line in (begin_line, end_line):
        append_line(run / "launch" / ATTEMPTS_NAME, line(first, submission="0001", task=None))
    append_line(run / "launch" / ATTEMPTS_NAME, begin_line(second, submission="0001", task=None))
    _, out, _ = submit(capfd, "status", run)
    assert "attempt 1.0: step 0 to 40; again, asked to stop\n  attempt 1.1: began at step 40\n" in out
    log = run / "logs/1.0/node-0/rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    assert submit(capfd, "logs", run)[1] == "step 1\n"
    slurm.mode = "unreachable"
    assert submit(capfd, "logs", run)[1] == "step 1\n"
    slurm.mode = "up"
    assert submit(capfd, "cancel", run)[1] == "cancelled 1\n" and slurm.jobs[0]["state"] == "cancelled"
    assert submit(capfd, "cancel", run)[1] == "nothing to cancel: it is over\n"
    slurm.mode = "unreachable"
    code, _, err = submit(capfd, "status", run)
    assert code == 1 and UNREACHABLE["slurm"] in err


def test_a_run_directory_with_spaces_and_quotes_is_named_as_a_shell_takes_it(capsys, slurm, data, tmp_path):
    run = tmp_path / "it's a run"
    words = ["train", *overrides(data, run)]
    assert submit(capsys, *SUBMIT, "--", *words)[0] == 0
    code, _, err = submit(capsys, *SUBMIT, "--", *words)
    assert code == 2 and f"opensora-dist cancel {shlex.quote(str(run))}" in err
    code, _, err = submit(capsys, *SUBMIT, "--", *words, f'run.dir="{tmp_path}/two\\nlines"')
    assert code == 2 and "holds a line break or another control character" in err
