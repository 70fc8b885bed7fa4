"""The Dockerfile's steps and the image's entry point, for real, on a bare Debian and on a base that has torch.

`make test-docker` runs these, as root. No GPU and no CUDA base image is in this: what they add isn't shown here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import images
import pytest

import opensora_dist

ROOT = Path(__file__).parents[2]
SECRETS = (".env", "opensora_dist/.env", "id_ed25519", "data/clip.mp4", ".git/config")

pytestmark = pytest.mark.skipif(images.problems() is not None, reason=images.problems() or "-")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    images.install_programs()
    made = images.Store(tmp_path_factory.mktemp("store"))
    try:
        images.make_base(made, "localhost/bare")
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    return images.pip_config(tmp_path_factory.mktemp("pip") / "conf")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of this tree, with files beside it that have no place in an image."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("Dockerfile", ".dockerignore", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "kernels", "launch", "opensora_dist"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SECRETS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a-secret-of-this-test\n")
    return folder


@pytest.fixture(scope="module")
def first(store, pip, source):
    """The steps of the first build."""
    return images.build(
        store, source, name="localhost/image", pip=pip, BASE_IMAGE="localhost/bare", EXTRAS="prepare", COMMIT="c0ffee"
    )


@pytest.fixture(scope="module")
def container(store, first):
    return images.Container(store, "localhost/image")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.returncode}\n{done.stdout}\n{done.stderr}"


def test_the_entry_point_runs_as_a_user_that_is_not_root(container):
    done = container.enter("--version")
    assert done.stdout.strip() == opensora_dist.__version__, _said(done)
    assert container.config["User"] == "10001:10001" and container.config["Entrypoint"] == ["opensora-dist"]
    assert container.run("id", "-u").stdout.strip() == "10001"
    assert container.run("touch", "/opt/venv/x").returncode != 0, "the program isn't its user's to change"


def test_doctor_finds_that_training_can_run_in_it(container):
    done = container.enter("doctor")
    print(done.stdout)
    assert done.returncode == 0 and "training can run here" in done.stdout, _said(done)


def test_the_demo_runs_in_it_from_toy_video_to_report(container):
    done = container.enter("demo", "demo", "--steps", "60")
    assert done.returncode == 0, _said(done)
    print(done.stdout)
    run_dir = container.root / "workspace/demo/run"
    assert (run_dir / "report.html").is_file() and list(run_dir.glob("samples/manual/*.mp4"))
    assert '"commit": "c0ffee"' in (run_dir / "environment.json").read_text()
    shutil.rmtree(container.root / "workspace/demo")


def test_any_user_may_run_it(container):
    """As with `docker run --user "$(id -u):$(id -g)"`, whose number has no name there."""
    done = container.run(
        *("python", "-c", "import getpass, pathlib; pathlib.Path('made').touch(); print(getpass.getuser(), pathlib.Path.home())"),
        options=("--user", "4242:4242"),
    )
    assert done.stdout.split() == ["opensora", "/home/opensora"], _said(done)
    assert (container.root / "workspace/made").stat().st_uid == 4242


def test_the_health_check_passes_and_fails_with_a_gpu_that_was_given_and_is_gone(container):
    kind, *check = container.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert container.run(*check).returncode == 0
    smi = container.root / "usr/local/bin/nvidia-smi"
    for script, code in (("echo 'GPU 0: NVIDIA H800'", 0), ("echo 'No devices were found'; exit 6", 1), ("echo none", 1)):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        done = container.run(*check)
        assert done.returncode == code, _said(done)
    smi.unlink()


def test_nothing_of_this_machine_and_no_secret_is_in_layers_or_history(container, pip):
    history = [mark for mark in (*pip.marks, "a-secret-of-this-test") if mark in container.history]
    assert not history
    marks = [word for mark in (*pip.marks, "a-secret-of-this-test") for word in ("-e", mark)]
    places = [
        str(container.root / name)
        for name in ("etc", "home", "mnt", "opt", "root", "run", "srv", "tmp", "usr", "var", "workspace")
    ]
    found = subprocess.run(["grep", "-rlF", *marks, *places], capture_output=True, text=True, check=False)
    assert not found.stdout, "\n".join(found.stdout.splitlines()[:20])
    tree = {str(p.relative_to(container.root)) for p in (container.root / "opt/opensora-dist").rglob("*")}
    assert "opt/opensora-dist/opensora_dist/cli/main.py" in tree and not [
        name for name in tree if Path(name).name in (".env", ".git")
    ]
    left = [str(p) for name in ("mnt", "tmp", "root/.cache") for p in (container.root / name).rglob("*") if p.is_file()]
    assert not left


def test_another_line_of_code_installs_no_dependency_anew(store, pip, source, first):
    assert not [step for step in first if step.startswith("cached")]
    touched = source / "opensora_dist/cli/main.py"
    touched.write_text(touched.read_text() + "\n# another line\n")
    (source / "README.md").write_text("another page\n")
    again = images.build(
        store, source, name="localhost/again", pip=pip, BASE_IMAGE="localhost/bare", EXTRAS="prepare", COMMIT="c0ffee"
    )
    heavy = [step for step in again if "apt-get" in step or "EXTRAS:+" in step]
    assert len(heavy) == 2 and all(step.startswith("cached RUN") for step in heavy), again
    assert "COPY opensora_dist opensora_dist/" in again, "it wasn't cached, since a file of it has changed"
    container = images.Container(store, "localhost/again")
    installed = next(container.root.glob("opt/venv/lib/python3*/site-packages/opensora_dist/cli/main.py"))
    assert installed.read_text().endswith("# another line\n")


def test_torch_of_the_base_is_kept(store, pip, source, first):
    """As an image of NVIDIA or PyTorch has it: in the base's own Python."""
    recipe = ROOT / "tests/docker/with_torch.Dockerfile"
    images.build(store, source, name="localhost/torch", pip=pip, file=recipe, BASE_IMAGE="localhost/bare")
    images.build(store, source, name="localhost/kept", pip=pip, BASE_IMAGE="localhost/torch", EXTRAS="")
    container = images.Container(store, "localhost/kept")
    where = container.run("python", "-c", "import torch; print(torch.__file__)")
    assert where.stdout.startswith("/usr/local/lib/python3"), _said(where)
    assert not list(container.root.glob("opt/venv/lib/python3*/site-packages/torch*"))
    assert (container.root / "opt/venv/base.txt").read_text().startswith("torch==")
    assert container.enter("train", "--help").returncode == 0
    assert os.path.lexists(container.root / "workspace/configs/train/toy.yaml")
