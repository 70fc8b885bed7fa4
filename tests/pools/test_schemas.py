"""Manifests hold to the real schemas, offline: Kubeflow Trainer's models of its resources, and SkyPilot's own reading of a task.

What is held to them are the golden files, which ``make test`` compares with what is rendered. Kubeflow's models drop what they don't
know without a word, so a manifest is held to what comes back from them; and a test shows of each schema that it notices a typo.
"""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kubeflow_trainer_api.models as kubeflow
import pytest
import sky
import yaml

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
TRAINJOBS = sorted((GOLDEN / "k8s").glob("*.yaml"))
TASKS = sorted((GOLDEN / "sky").glob("*.yaml"))
RUNTIME = ROOT / "launch" / "k8s" / "runtime.yaml"


def _through(model, manifest):
    """What is left of a manifest once Kubeflow's models have read it."""
    return model.from_dict(copy.deepcopy(manifest)).to_dict()


def _paths(value, path=()) -> Iterator[tuple]:
    """Of every key that a schema names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _paths(inner, (*path, i))


# Under these, keys are data.
_FREE = ("labels", "requests", "limits", "nodeSelector", "envs", "secrets", "file_mounts", "volumes:sky", "torch")


def _named(manifest, *, free=_FREE):
    found = [p for p in _paths(manifest) if isinstance(p[-1], str) and not set(p[:-1]) & set(free)]
    assert len(found) > 10
    return found


def _with_typo(manifest, path):
    changed = copy.deepcopy(manifest)
    place = changed
    for word in path[:-1]:
        place = place[word]
    place[path[-1] + "x"] = place.pop(path[-1])
    return changed


def test_there_are_manifests_to_hold():
    assert len(TRAINJOBS) == 3 and len(TASKS) == 3


@pytest.mark.parametrize("path", TRAINJOBS, ids=lambda p: p.stem)
def test_a_trainjob_is_one_to_kubeflow_trainer(path):
    manifest = yaml.safe_load(path.read_text())
    assert _through(kubeflow.TrainerV1alpha1TrainJob, manifest) == manifest


@pytest.mark.parametrize("path", TRAINJOBS, ids=lambda p: p.stem)
def test_a_typo_in_any_field_of_a_trainjob_is_noticed(path):
    manifest = yaml.safe_load(path.read_text())
    missed = []
    for place in _named(manifest):
        changed = _with_typo(manifest, place)
        try:
            if _through(kubeflow.TrainerV1alpha1TrainJob, changed) == changed:
                missed.append(place)
        except ValueError:  # it was required
            continue
    assert not missed


def test_the_runtime_is_one_to_kubeflow_trainer():
    manifest = yaml.safe_load(RUNTIME.read_text())
    assert _through(kubeflow.TrainerV1alpha1ClusterTrainingRuntime, manifest) == manifest
    for place in _named(manifest):
        changed = _with_typo(manifest, place)
        try:
            assert _through(kubeflow.TrainerV1alpha1ClusterTrainingRuntime, changed) != changed, place
        except ValueError:
            continue


def test_a_trainjob_patches_a_job_and_a_container_that_the_runtime_has():
    (job,) = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    for path in TRAINJOBS:
        (patch,) = yaml.safe_load(path.read_text())["spec"]["runtimePatches"]
        (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert patched["name"] == job["name"]
        (inner,) = patched["template"]["spec"]["template"]["spec"]["containers"]
        assert inner["name"] == container["name"]
        assert "env" not in inner  # Trainer refuses variables of this container anywhere but in spec.trainer


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """SkyPilot reads tasks without its server; secrets are taken from the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    monkeypatch.setenv("WANDB_API_KEY", "x")


def _task(text, folder):
    path = folder / "task.yaml"
    path.write_text(text)
    return sky.Task.from_yaml(str(path))


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_task_is_one_to_skypilot(path, offline, tmp_path):
    manifest = yaml.safe_load(path.read_text())
    # The command line gives secrets their values; read from a file alone they have to have one.
    manifest["secrets"] = dict.fromkeys(manifest.get("secrets") or {}, "x")
    task = _task(yaml.safe_dump(manifest), tmp_path)
    (resources,) = task.resources
    assert task.name == manifest["name"] and task.num_nodes == manifest["num_nodes"] and task.run == manifest["run"]
    assert {k: task.envs[k] for k in manifest["envs"]} == manifest["envs"]
    assert resources.use_spot is manifest["resources"]["use_spot"]
    assert resources.job_recovery["recover_on_exit_codes"] == [75] and resources.job_recovery["max_restarts_on_errors"] == 0
    wanted = manifest["resources"].get("accelerators")
    assert resources.accelerators == (None if wanted is None else {wanted.split(":")[0]: int(wanted.split(":")[1])})


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_typo_in_any_field_of_a_task_is_refused(path, offline, tmp_path):
    manifest = yaml.safe_load(path.read_text())
    manifest["secrets"] = dict.fromkeys(manifest.get("secrets") or {}, "x")
    _task(yaml.safe_dump(manifest), tmp_path)
    free = ("envs", "secrets", "file_mounts", "volumes", "job_recovery")
    for place in _named(manifest, free=free):
        with pytest.raises(ValueError):
            _task(yaml.safe_dump(_with_typo(manifest, place)), tmp_path)


def test_skypilots_command_line_has_the_options_that_it_is_given():
    for words in (["launch", "--yes", "--detach-run", "--secret"], ["queue", "--all", "--output"], ["cancel", "--yes"], ["logs", "--no-follow"]):
        shown = subprocess.run(["sky", "jobs", words[0], "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
        assert all(option in shown for option in words[1:])
