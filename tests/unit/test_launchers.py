"""What every launcher must be, whatever its scheduler. A new one joins by its name in ``BACKENDS``, and in ``tests/fake_schedulers.py``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from dataset_factory import write_dataset
from fake_schedulers import LOST, REFUSED, UNREACHABLE, Scheduler
from pool_jobs import as_kubernetes_reads
from training import SAMPLES, overrides

from opensora_dist.cli.main import main
from opensora_dist.config.load import dump_yaml
from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import BACKENDS, LaunchError, Phase, UnsureError, ask
from opensora_dist.launch.job import Job
from opensora_dist.launch.k8s import MANIFEST_NAME
from opensora_dist.launch.records import read_records
from opensora_dist.launch.registry import LAUNCHERS, build_launcher

WORDS = (
    "it's",
    'a "quoted" run',
    "$(touch hacked)",
    "`touch hacked`",
    "two  spaces",
    "%j and %",
    "${x}",
    "{{ job }}",
    "ends with \\",
    "ünï",
    ";#&|>",
)
LINES = "two\nlines: 'and' \"quotes\""


def make_job(tmp_path, *, word="run", caption="a cat", kind="train", variable="value", argv=()):
    """A run on CPUs that every scheduler takes, but for what is asked for."""
    run_dir = tmp_path / word
    folder = run_dir / "launch/0001"
    site = SiteConfig.model_validate(
        {
            "node": {"variables": {"NAME": variable}},
            "k8s": {"image": "image:1", "claims": {"shared": str(tmp_path)}, "cpus": "4"},
            "sky": {"volumes": {str(tmp_path): "shared"}},
        }
    )
    return Job(
        id="run-0123abcd",
        name="run",
        kind=kind,
        argv=(kind, *argv, str(folder / "config.yaml")),
        nodes=2,
        gpus_per_node=0,
        ranks_per_node=2,
        time_limit_s=None,
        max_requeues=3,
        run_dir=run_dir,
        folder=folder,
        config=folder / "config.yaml",
        config_text=yaml.safe_dump({"validation": {"prompts": [caption]}}),
        site=site,
    )


def written(launcher, job):
    """What ``submit`` does before it asks the scheduler."""
    assert not launcher.problems(job)
    for name, text in {job.config.name: job.config_text, **launcher.render(job)}.items():
        (job.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / name).write_text(text)
    return job


def texts(value):
    """Everything that a rendered file says, as whoever reads it takes it: scalars of YAML, JSON in them, words of shell in them."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    found = [str(value)]
    try:
        inner = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        inner = None
    if isinstance(inner, dict | list):
        return found + texts(inner)
    if isinstance(value, str):
        words = shlex.shlex(value, posix=True, punctuation_chars=True)
        with suppress(ValueError):  # no shell: a caption
            found += [word for token in words for word in (token, token.partition("=")[2])]
    return found


def held(files):
    """All texts of all files."""
    found = []
    for name, text in files.items():
        seen = as_kubernetes_reads(text) if name == MANIFEST_NAME else text
        found += texts(yaml.safe_load(seen) if name.endswith(".yaml") else seen)
    return found


@pytest.fixture
def scheduler(backend, tmp_path, monkeypatch):
    found = Scheduler(backend, tmp_path / "scheduler")
    monkeypatch.setenv("PATH", f"{found.path}{os.pathsep}{os.environ['PATH']}")
    return found


pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def test_rendering_is_pure(backend, tmp_path, monkeypatch):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    first = launcher.render(job)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert build_launcher(backend, job.site).render(job) == first and first
    assert launcher.command(job) == build_launcher(backend, job.site).command(job)
    assert not launcher.problems(job)
    assert not list(tmp_path.iterdir())
    assert tuple(LAUNCHERS) == BACKENDS and launcher.name == backend


@pytest.mark.parametrize("word", WORDS)
def test_a_name_with_quotes_spaces_or_shell_in_it_survives_or_is_refused(backend, tmp_path, word):
    job = make_job(tmp_path, word=word, caption=f"{word} {LINES}", variable=word)
    launcher = build_launcher(backend, job.site)
    if problems := launcher.problems(job):
        assert all(str(job.run_dir) in p or repr(str(job.run_dir))[1:-1] in p for p in problems), problems
        return
    files = launcher.render(job)
    found = held(files)
    assert word in found, "of a variable"
    assert str(job.run_dir) in found or str(job.folder) in found
    assert job.argv[-1] in found or job.config_text in found
    if job.config_text in found:
        assert f"{word} {LINES}" in yaml.safe_load(job.config_text)["validation"]["prompts"]


@pytest.mark.parametrize("variable", [LINES, "", "-n", "\t", "\x7f\x85\u2028\ufeff", "🎬"])
def test_a_variable_of_the_site_survives_whatever_it_holds(backend, tmp_path, variable):
    job = make_job(tmp_path, variable=variable)
    assert variable in held(build_launcher(backend, job.site).render(job))


@pytest.mark.parametrize("call", ["submit", "find", "status", "cancel"])
def test_a_machine_without_the_scheduler_is_told_so(backend, tmp_path, monkeypatch, call):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    written(launcher, job)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LaunchError, match="can't be run here") as caught:
        _call(launcher, call, job)
    assert not isinstance(caught.value, UnsureError)


def _call(launcher, call, job):
    return getattr(launcher, call)(job if call in ("submit", "find") else ["1"])


@pytest.mark.parametrize("call", ["submit", "find", "status", "cancel"])
def test_an_unreachable_scheduler_is_an_error_and_never_an_answer(backend, tmp_path, scheduler, call):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    written(launcher, job)
    scheduler.mode = "unreachable"
    with pytest.raises(LaunchError) as caught:
        _call(launcher, call, job)
    assert UNREACHABLE[backend] in str(caught.value)
    # SkyPilot says the same where the connection is lost after a job was sent.
    assert call != "submit" or isinstance(caught.value, UnsureError) == (backend == "sky")


def test_what_is_submitted_is_found_seen_and_cancelled(backend, tmp_path, scheduler):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    assert launcher.find(written(launcher, job)) == []
    job_ids = launcher.submit(job)
    assert job_ids and launcher.find(job) == job_ids
    assert launcher.find(make_job(tmp_path / "other")) == job_ids, "a job is found by its id alone"
    states = [launcher.status(job_ids)]
    for state in ("running", "done", "failed"):
        scheduler.end(state)
        states.append(launcher.status(job_ids))
    assert [[s.job_id for s in found] for found in states] == [job_ids] * 4
    assert [found[0].phase for found in states] == [Phase.WAITING, Phase.RUNNING, Phase.DONE, Phase.FAILED]
    assert all(s.said for found in states for s in found)
    scheduler.end("running")
    launcher.cancel(job_ids)
    assert all(s.phase.over for s in launcher.status(job_ids))


def test_logs_are_a_command_or_a_file_or_not_there_yet(backend, tmp_path, scheduler):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    for follow in (True, False):
        with suppress(LaunchError):  # nothing is written yet
            shown = launcher.logs(job, ["1"], follow=follow)
            assert shown.is_file() if isinstance(shown, Path) else shutil.which(shown[0])


def test_a_job_that_the_scheduler_has_forgotten_is_over(backend, scheduler, tmp_path):
    launcher = build_launcher(backend, make_job(tmp_path).site)
    assert [(s.job_id, s.phase, s.phase.over) for s in launcher.status(["777", "888"])] == [
        ("777", Phase.UNKNOWN, True),
        ("888", Phase.UNKNOWN, True),
    ]


def test_a_refusal_is_shown_whole(backend, tmp_path, scheduler):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    written(launcher, job)
    scheduler.mode = "refuses"
    with pytest.raises(LaunchError) as caught:
        launcher.submit(job)
    assert REFUSED[backend] in str(caught.value)
    assert not isinstance(caught.value, UnsureError) and not scheduler.jobs


@pytest.mark.parametrize("mode", ["hangs", "dies", "lost"])
def test_a_submission_without_an_answer_is_unsure_and_found_where_it_arrived(backend, tmp_path, scheduler, monkeypatch, mode):
    job = make_job(tmp_path)
    launcher = build_launcher(backend, job.site)
    written(launcher, job)
    if mode == "hangs":
        monkeypatch.setattr(
            sys.modules[type(launcher).__module__], "ask", lambda *args, **more: ask(*args, **{**more, "timeout_s": 0.5})
        )
    scheduler.mode = mode
    with pytest.raises(UnsureError) as caught:
        launcher.submit(job)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{scheduler.path}{os.pathsep}{os.environ['PATH']}")
    scheduler.mode = "up"
    assert (LOST[backend] in str(caught.value)) == (mode == "lost")
    assert launcher.find(job) == [j["id"] for j in scheduler.jobs]
    assert len(scheduler.jobs) == (0 if mode == "hangs" else 1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched") / "data"
    write_dataset(folder, samples=SAMPLES)
    return folder


def test_nothing_is_submitted_twice(backend, tmp_path, scheduler, data, capsys):
    site = make_job(tmp_path).site
    (tmp_path / "site.yaml").write_text(dump_yaml(site))
    options = [
        "--backend",
        backend,
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--ranks-per-node",
        "2",
        "--site",
        f"{tmp_path}/site.yaml",
    ]
    command = ["submit", *options, "--", "train", *overrides(data, tmp_path / "run")]
    scheduler.mode = "dies"
    assert main(command) == 1 and "asks for it first" in capsys.readouterr().err
    scheduler.mode = "unreachable"
    assert main(command) == 1 and UNREACHABLE[backend] in capsys.readouterr().err
    scheduler.mode = "up"
    for _ in range(2):
        assert main(command) == 2
        assert "submitted already" in capsys.readouterr().err
    (job,) = scheduler.jobs
    assert main(["cancel", f"{tmp_path}/run"]) == 0 and main(command) == 0
    assert [r.job_ids[0] for r in read_records(tmp_path / "run")] == [job["id"], scheduler.jobs[-1]["id"]]
