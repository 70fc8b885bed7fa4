"""Manifests hold to the real schemas, offline: Kubeflow Trainer's models of its resources, and SkyPilot's own reading of a task.

What is held to them are the golden files, which ``make test`` compares with what is rendered. Kubeflow's models drop what they don't
know without a word, so a manifest is held to what comes back from them; and a test shows of each schema that it notices a typo.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import kubeflow_trainer_api.models as kubeflow
import pytest
import sky
import yaml
from sky.client.cli import command
from sky.utils import schemas

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
_FREE = ("labels", "requests", "limits", "nodeSelector")


def _named(manifest, *, free=_FREE):
    found = [p for p in _paths(manifest) if isinstance(p[-1], str) and not set(p[:-1]) & set(free)]
    assert len(found) >= 10
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


def _task(manifest):
    """As `sky jobs launch --secret NAME ...` reads it, where the environment has each secret."""
    secrets = [(name, "x") for name in manifest.get("secrets") or {}]
    return sky.Task.from_yaml_config(copy.deepcopy(manifest), secrets_overrides=secrets)


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_task_is_one_to_skypilot(path):
    manifest = yaml.safe_load(path.read_text())
    task = _task(manifest)
    (resources,) = task.resources
    assert task.name == manifest["name"] and task.num_nodes == manifest["num_nodes"] and task.run == manifest["run"]
    assert {k: task.envs[k] for k in manifest["envs"]} == manifest["envs"]
    assert resources.use_spot is manifest["resources"]["use_spot"]
    wanted = manifest["resources"].get("accelerators")
    assert resources.accelerators == (None if wanted is None else {wanted.split(":")[0]: int(wanted.split(":")[1])})


def test_a_file_is_read_as_its_text_is():
    path = GOLDEN / "sky" / "small.yaml"  # the one without secrets, whose values only the command line gives
    read = sky.Task.from_yaml(str(path)).to_yaml_config()
    given = _task(yaml.safe_load(path.read_text())).to_yaml_config()
    kept = "_user_specified_yaml"  # with its comments
    assert read.pop(kept) == path.read_text() and given.pop(kept) and read == given


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_typo_in_any_field_of_a_task_is_refused(path):
    manifest = yaml.safe_load(path.read_text())
    # What is in job_recovery passes here, since the server may have plugins; the next test holds it.
    for place in _named(manifest, free=("envs", "secrets", "file_mounts", "volumes", "job_recovery")):
        with pytest.raises(ValueError, match=rf"(?i){place[-1]}|found unsupported"):
            _task(_with_typo(manifest, place))


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_recovery_is_asked_for_in_words_that_skypilot_knows(path):
    manifest = yaml.safe_load(path.read_text())
    choices = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"]
    (known,) = (choice["properties"] for choice in choices if choice["type"] == "object")
    asked = manifest["resources"]["job_recovery"]
    assert set(asked) <= set(known)
    (resources,) = _task(manifest).resources
    assert {key: resources.job_recovery[key] for key in asked} == asked


def test_skypilots_command_line_has_the_options_that_it_is_given():
    for name, options in {
        "launch": {"--yes", "--detach-run", "--secret"},
        "queue": {"--all", "--output"},
        "logs": {"--follow", "--no-follow"},
        "cancel": {"--yes"},
    }.items():
        found = command.jobs.commands[name].params
        assert options <= {word for p in found for word in (*p.opts, *p.secondary_opts)}
