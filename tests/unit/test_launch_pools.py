"""What Kubernetes and SkyPilot are given, character by character, and what they are asked. tests/pools holds it to their schemas.

``OPENSORA_GOLDEN=write`` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pool_jobs import FULL_SITE, SMALL_SITE, as_kubernetes_reads, pool_job, pool_jobs

from opensora_dist.launch.base import LaunchError, Phase, UnsureError
from opensora_dist.launch.k8s import KubernetesLauncher
from opensora_dist.launch.pools import SUBMISSION_VARIABLE, as_nodes_see
from opensora_dist.launch.registry import build_launcher
from opensora_dist.launch.sky import SkyLauncher

GOLDEN = Path(__file__).parent.parent / "golden"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
CASES = [(backend, name) for backend in ("k8s", "sky") for name in pool_jobs(backend)]


def _only(files):
    (text,) = files.values()
    return text


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_a_manifest_is_its_golden_file(backend, name):
    job = pool_jobs(backend)[name]
    launcher = build_launcher(backend, job.site)
    assert launcher.problems(job) == []
    text = _only(launcher.render(job))
    path = GOLDEN / backend / f"{name}.yaml"
    if os.environ.get("OPENSORA_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def _script(backend, manifest):
    return manifest["run"] if backend == "sky" else as_kubernetes_reads(manifest["spec"]["trainer"]["args"][0])


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_what_a_node_runs_is_clean_to_shellcheck(backend, name, tmp_path):
    script = tmp_path / "node.sh"
    script.write_text("#!/bin/bash\n" + _script(backend, yaml.safe_load((GOLDEN / backend / f"{name}.yaml").read_text())))
    # What node.setup sources isn't here.
    found = subprocess.run([SHELLCHECK, "--exclude=SC1091", str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("backend", ["k8s", "sky"])
def test_lines_of_setup_stay_lines_whatever_they_hold(backend):
    nasty = ["echo 'a: b' # c", 'x="$(id) {{ y }}"', "  echo - indented", "echo \\\\", 'kill $$ "$(OMP_NUM_THREADS)" $$(x)']
    site = SMALL_SITE.model_copy(update={"node": SMALL_SITE.node.model_copy(update={"setup": nasty})})
    text = _only(build_launcher(backend, site).render(pool_job(site)))
    assert _script(backend, yaml.safe_load(text)).splitlines()[1 : len(nasty) + 1] == nasty


def _given(manifest):
    """Variables of a container; each may name those before it."""
    found = {}
    for variable in manifest["spec"]["trainer"]["env"]:
        found[variable["name"]] = as_kubernetes_reads(variable["value"], found)
    return found


def test_a_dollar_is_a_dollar_to_kubernetes_as_well():
    variables = {"FIRST": "1", "SECOND": "$(FIRST) $$ $FIRST $$(FIRST)"}
    site = SMALL_SITE.model_copy(update={"node": SMALL_SITE.node.model_copy(update={"variables": variables})})
    job = pool_job(site, config_text="name: $(FIRST) $$\n")
    given = _given(yaml.safe_load(_only(KubernetesLauncher(site).render(job))))
    assert {name: given[name] for name in variables} == variables
    assert json.loads(given[SUBMISSION_VARIABLE])["config.yaml"] == job.config_text


@pytest.mark.parametrize("backend", ["k8s", "sky"])
def test_nodes_bring_along_what_was_submitted_to_where_they_look_for_it(backend):
    records = Path("/home/someone/records/launch/0007")
    job = pool_job(folder=records, config=records / "config.yaml", argv=("train", str(records / "config.yaml")))
    manifest = yaml.safe_load(_only(build_launcher(backend, job.site).render(job)))
    if backend == "sky":
        carried = manifest["envs"][SUBMISSION_VARIABLE]
    else:
        carried = _given(manifest)[SUBMISSION_VARIABLE]
    files = json.loads(carried)
    assert files["config.yaml"] == job.config_text
    seen = json.loads(files["submission.json"])["job"]
    assert seen["folder"] == "/runs/clips/launch/0007" and seen["argv"] == ["train", "/runs/clips/launch/0007/config.yaml"]
    assert str(as_nodes_see(job).folder) in _script(backend, manifest)
    assert "/home/someone" not in json.dumps(manifest)


def test_a_manifest_holds_no_value_of_a_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    for backend in ("k8s", "sky"):
        launcher = build_launcher(backend, FULL_SITE)
        job = pool_jobs(backend)["full"]
        assert "hush" not in _only(launcher.render(job)) and "hush" not in " ".join(launcher.command(job))


def _k8s(name="clips", **k8s):
    site = SMALL_SITE.model_copy(update={"k8s": SMALL_SITE.k8s.model_copy(update=k8s)})
    return KubernetesLauncher(site).problems(pool_job(site, name=name, id=f"{name}-0a1b2c3d"))


@pytest.mark.parametrize(
    ("name", "offered"),
    [("My_Run", "my-run"), ("2nd", "run-2nd"), ("a.b", "a-b"), ("x" * 48, "x" * 39), ("clips-", "clips")],
)
def test_a_name_that_pods_cant_have_is_refused_with_one_that_they_can(name, offered):
    (problem,) = _k8s(name)
    assert f"--name {name!r}" in problem and problem.endswith(f"pass --name {offered}")
    assert _k8s(offered) == []


def test_the_longest_name_leaves_room_for_what_pods_add():
    for nodes in (1, 11, 1001):
        name = "x" * 48
        (problem,) = KubernetesLauncher(SMALL_SITE).problems(pool_job(name=name, id=f"{name}-0a1b2c3d", nodes=nodes))
        most = int(re.search(r"at most (\d+)", problem)[1])
        assert len(f"{'x' * most}-0a1b2c3d-node-0-{nodes - 1}-abcde") == 63


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image", None, "docker build"),
        ("namespace", "My_Space", "DNS label"),
        ("queue", "q" * 64, "at most 63"),
        ("runtime", "torch_distributed", "DNS name"),
        ("memory", "1600 GB", "1600Gi"),
        ("shared_memory", "lots", "64Gi"),
        ("gpu_resource", "nvidia.com/gpu/8", "kubectl describe node"),
        ("rdma_resource", "rdma/", "kubectl describe node"),
        ("node_selector", {"pool": "a b"}, "no label"),
        ("node_selector", {"pool": "x" * 64}, "at most 63"),
        ("secrets", {"WANDB_API_KEY": "wandb"}, "SECRET/KEY"),
        ("secrets", {"PET_NNODES": "a/b"}, "leave it out"),
        ("claims", {"runs": "/other"}, "no mount path"),
        ("claims", {"Runs": "/runs"}, "PersistentVolumeClaim"),
        ("claims", {"runs": "/runs", "shm": "/dev/shm"}, "not /dev/shm"),
    ],
)
def test_a_field_that_the_api_server_would_refuse_is_refused_with_its_rule(field, value, says):
    (problem,) = _k8s(**{field: value})
    assert says in problem and (field in problem or "PET_" in problem)


def _sky(name="clips", setup=(), time_limit_s=None, **sky):
    node = SMALL_SITE.node.model_copy(update={"setup": list(setup)})
    site = SMALL_SITE.model_copy(update={"node": node, "sky": SMALL_SITE.sky.model_copy(update=sky)})
    return SkyLauncher(site).problems(pool_job(site, name=name, time_limit_s=time_limit_s))


def test_what_skypilot_cant_do_is_refused_with_a_way_out():
    assert _sky() == []
    for problems, says in [
        (_sky("2nd run"), "pass --name run-2nd-run"),
        (_sky(time_limit_s=60), "no time limit"),
        (_sky(secrets=["A=b"]), "not its value"),
        (_sky(volumes={"runs": "runs"}, setup=["mount"]), "absolute path"),
        (_sky(volumes={}), "gone with its machine"),
        (_sky(volumes={}, file_mounts={"/runs": "s3://runs"}), "in a bucket"),
    ]:
        (problem,) = problems
        assert says in problem
    assert _sky(volumes={}, setup=["sudo mount -t nfs4 files:/runs /runs"]) == []


@pytest.mark.parametrize("backend", ["k8s", "sky"])
def test_what_no_pool_can_do_is_refused_with_a_way_out(backend):
    launcher = build_launcher(backend, SMALL_SITE)
    modules = SMALL_SITE.model_copy(update={"node": SMALL_SITE.node.model_copy(update={"modules": ["cuda"]})})
    for job, says in [
        (pool_job(kind="prepare", array=8), "--part 1/8"),
        (pool_job(kind="bench", nodes=2), "--nodes 1"),
        (pool_job(modules), "node.setup"),
    ]:
        (problem,) = launcher.problems(job)
        assert says in problem


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a program on PATH that answers as told, and notes what it was asked."""

    def make(name, *, out="", err="", code=0):
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/out\ncat {tmp_path}/err >&2\nexit {code}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return lambda: (tmp_path / "asked").read_text().splitlines()

    return make


def test_kubectl_is_asked_once_in_the_context_and_namespace_of_the_site(fake):
    asked = fake("kubectl", out="trainjob.trainer.kubeflow.org/clips-0a1b2c3d\n")
    job = pool_jobs("k8s")["full"]
    assert KubernetesLauncher(FULL_SITE).submit(job) == ["clips-0a1b2c3d"]
    assert asked() == [f"--context h100 --namespace video create --filename {job.folder}/trainjob.yaml --output name"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("The connection to the server localhost:8080 was refused - did you specify the right host or port?", LaunchError),
        ('error: resource mapping not found for name: "x": no matches for kind "TrainJob"', LaunchError),
        ("Error from server (Forbidden): trainjobs.trainer.kubeflow.org is forbidden", LaunchError),
        ("Error from server (Timeout): the server was unable to return a response in the time allotted", UnsureError),
        ('error: Post "https://10.0.0.1:6443/apis": unexpected EOF', UnsureError),
        ("Error from server (InternalError): an error on the server", UnsureError),
        ("net/http: TLS handshake timeout", UnsureError),
    ],
)
def test_a_refusal_of_kubernetes_is_told_from_an_answer_that_never_came(fake, said, kind):
    fake("kubectl", err=said, code=1)
    with pytest.raises(LaunchError) as caught:
        KubernetesLauncher(SMALL_SITE).submit(pool_job())
    assert type(caught.value) is kind and said in str(caught.value)


def test_a_trainjob_that_is_there_already_is_this_submission(fake):
    fake("kubectl", err='Error from server (AlreadyExists): trainjobs "clips-0a1b2c3d" already exists', code=1)
    assert KubernetesLauncher(SMALL_SITE).submit(pool_job()) == ["clips-0a1b2c3d"]


@pytest.mark.skipif(not Path("/usr/bin/kubectl").exists(), reason="no kubectl here: install it as /usr/bin/kubectl")
def test_a_real_kubectl_without_a_cluster_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    launcher, job = KubernetesLauncher(SMALL_SITE), pool_job(folder=tmp_path, config=tmp_path / "config.yaml")
    for name, text in launcher.render(job).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LaunchError, match="connection refused") as caught:
        launcher.submit(job)
    assert type(caught.value) is LaunchError
    for ask in (lambda: launcher.find(job), lambda: launcher.status([job.id]), lambda: launcher.cancel([job.id])):
        with pytest.raises(LaunchError, match="refused"):
            ask()


def _trainjob(name, *conditions, active=0):
    states = [{"type": kind, "status": value, "reason": "Because"} for kind, value in conditions]
    return {"metadata": {"name": name}, "status": {"conditions": states, "jobsStatus": [{"name": "node", "active": active}]}}


def test_the_state_of_a_trainjob_is_read_from_its_conditions_and_pods(fake):
    jobs = [
        _trainjob("done", ("Suspended", "False"), ("Complete", "True")),
        _trainjob("failed", ("Failed", "True")),
        _trainjob("queued", ("Suspended", "True")),
        _trainjob("runs", ("Suspended", "False"), active=2),
        _trainjob("starts"),
    ]
    fake("kubectl", out=json.dumps({"kind": "List", "items": jobs}))
    found = KubernetesLauncher(SMALL_SITE).status(["starts", "runs", "queued", "failed", "done", "gone"])
    expected = [Phase.WAITING, Phase.RUNNING, Phase.WAITING, Phase.FAILED, Phase.DONE, Phase.UNKNOWN]
    assert [s.phase for s in found] == expected
    assert found[3].said == "Failed: Because"


@pytest.mark.parametrize(("out", "phase"), [("", Phase.UNKNOWN), (json.dumps(_trainjob("one", active=1)), Phase.RUNNING)])
def test_one_trainjob_is_no_list_and_none_is_nothing(fake, out, phase):
    fake("kubectl", out=out)
    assert [s.phase for s in KubernetesLauncher(SMALL_SITE).status(["one"])] == [phase]


QUEUE = [
    {"job_id": 1, "job_name": "other", "status": "RUNNING", "failure_reason": None},
    {"job_id": 7, "job_name": "clips-0a1b2c3d", "status": "RECOVERING", "failure_reason": None},
    {"job_id": 8, "job_name": "x", "status": "FAILED_SETUP", "failure_reason": "pip"},
    {"job_id": 9, "job_name": "y", "status": "SUCCEEDED", "failure_reason": None},
]


def test_skypilots_job_is_found_by_its_name_and_its_state_by_its_id(fake):
    asked = fake("sky", out="Fetching managed job statuses...\n" + json.dumps(QUEUE))
    launcher = SkyLauncher(SMALL_SITE)
    assert launcher.submit(pool_job()) == ["7"]
    assert [s.phase for s in launcher.status(["7", "8", "9", "99"])] == [Phase.WAITING, Phase.FAILED, Phase.DONE, Phase.UNKNOWN]
    launcher.cancel(["7", "9"])
    assert asked()[0] == f"jobs launch --yes --detach-run {pool_job().folder}/task.yaml"
    assert asked()[-1] == "jobs cancel --yes 7"  # the other one is over


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("sky.exceptions.ResourcesUnavailableError: no H100 in aws", LaunchError),
        ("sky.exceptions.InvalidSkyPilotConfigError: Invalid task YAML: Instead of 'runn', did you mean 'run'?", LaunchError),
        ("Usage: sky jobs launch [OPTIONS] ENTRYPOINT...\nError: No such option: --nix", LaunchError),
        ("Connection reset by peer", UnsureError),
        # Words that a refusal has, too.
        ("urllib3.exceptions.InvalidChunkLength: Invalid chunk length", UnsureError),
        ("sky.exceptions.ClusterNotUpError: job controller not found", UnsureError),
        ("sky.exceptions.RequestInterruptedError: Request was not found, Usage: sky api", UnsureError),
        # Comes while an answer is waited for, too.
        ("sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server at http://127.0.0.1:1.", UnsureError),
        ("sky.exceptions.NoCloudAccessError: x\n\nDuring handling another\n\nrequests.exceptions.ReadTimeout: y", UnsureError),
    ],
)
def test_what_skypilot_says_before_it_submits_is_a_refusal_and_all_else_may_have_arrived(fake, said, kind):
    fake("sky", err=said, code=1)
    with pytest.raises(LaunchError) as caught:
        SkyLauncher(SMALL_SITE).submit(pool_job())
    assert type(caught.value) is kind


def test_no_controller_is_no_jobs_and_one_that_isnt_up_is_no_answer(fake):
    """So that a first submission that failed without a clear word can be made again."""
    fake("sky", err="sky.exceptions.ClusterNotUpError: No in-progress managed jobs.", code=1)
    assert SkyLauncher(SMALL_SITE).find(pool_job()) == []
    fake("sky", err="sky.exceptions.ClusterNotUpError: Controller's latest status is INIT; jobs will not be shown", code=1)
    with pytest.raises(LaunchError):
        SkyLauncher(SMALL_SITE).find(pool_job())


def test_logs_are_a_command_that_shows_every_node(fake):
    job = pool_job(nodes=12)
    shown = KubernetesLauncher(SMALL_SITE).logs(job, ["clips-0a1b2c3d"], follow=True)
    assert "jobset.sigs.k8s.io/jobset-name=clips-0a1b2c3d" in shown and shown[-3:] == ["--max-log-requests", "12", "--follow"]
    assert SkyLauncher(SMALL_SITE).logs(job, ["7"], follow=False) == ["sky", "jobs", "logs", "--no-follow", "7"]
