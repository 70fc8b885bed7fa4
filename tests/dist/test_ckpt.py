"""`opensora-dist ckpt`: what a run has saved, whether it is whole, and one file of weights from it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from dataset_factory import write_dataset
from safetensors import safe_open
from training import SAMPLES, overrides, tensors, train_here

from opensora_dist.checkpoint.commit import step_name
from opensora_dist.cli.main import main
from opensora_dist.models.importers import read_open_sora
from opensora_dist.recipes.build import meta_model
from opensora_dist.recipes.sharing import describe_checkpoint

STDIT, DIT = "stdit", "dit"


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """Two checkpoints of two ranks each, by model."""
    data = tmp_path_factory.mktemp("ckpt") / "data"
    write_dataset(data, samples=SAMPLES)
    made = {}
    for model, more in ((STDIT, ("objective.name=iddpm",)), (DIT, ("model.name=dit", "model.pooled_text=true"))):
        made[model] = tmp_path_factory.mktemp(model)
        args = overrides(data, made[model], "run.steps=4", "checkpoint.every_steps=2", "parallel.zero.stage=3", *more)
        ranks.run(train_here, args, world=2)
    return made


@pytest.fixture
def run(runs, tmp_path):
    """A copy, to damage."""
    shutil.copytree(runs[STDIT], tmp_path / "run")
    return tmp_path / "run"


def _damage(run, step=4):
    with open(run / "checkpoints" / step_name(step) / "trainer.json", "r+b") as handle:
        handle.write(b"[")


def test_ls_says_step_size_and_who_wrote_it(runs, capsys):
    assert main(["ckpt", "ls", str(runs[STDIT]), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(c["step"], c["latest"], c["problems"]) for c in listed] == [(4, True, []), (2, False, [])]
    folder = runs[STDIT] / "checkpoints" / step_name(4)
    assert listed[0]["num_bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    assert listed[0]["layout"] == {
        "world": 2,
        "backend": "native",
        "zero_stage": 3,
        "dtype": "float32",
        "mesh": "2 ranks on cpu: dp_shard 2",
    }
    assert main(["ckpt", "ls", str(runs[STDIT])]) == 0
    said = capsys.readouterr().out
    assert "native stage 3, 2 ranks on cpu: dp_shard 2" in said and "complete" in said and "latest" in said


def test_ls_shows_what_is_missing_and_saves_that_were_cut_off(run, capsys):
    (run / "checkpoints" / step_name(4) / "trainer.json").unlink()
    (run / "checkpoints" / (step_name(6) + ".partial-0123abcd")).mkdir()
    assert main(["ckpt", "ls", str(run)]) == 0
    said = capsys.readouterr().out
    assert "trainer.json: missing" in said and "1 saves were cut off" in said


def test_verify_reads_every_byte_and_ends_with_1_where_one_differs(run, capsys):
    assert main(["ckpt", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    _damage(run)
    assert main(["ckpt", "verify", str(run)]) == 1
    said = capsys.readouterr()
    assert f"{step_name(4)}: damaged" in said.out and "trainer.json: content hash" in said.out
    assert f"{step_name(2)}: verified" in said.out
    assert "1 of 2 checkpoints are damaged" in said.err
    assert main(["ckpt", "verify", str(run / "checkpoints" / step_name(2))]) == 0
    capsys.readouterr()
    assert main(["ckpt", "verify", str(run / "checkpoints" / step_name(4)), "--json"]) == 1
    (only,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert only["step"] == 4 and "trainer.json: content hash" in only["problems"][0]


@pytest.mark.parametrize("weights, prefix", [("ema", "ema."), ("raw", "model.")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_reads_back_as_open_sora_weights_of_the_same_values(runs, tmp_path, weights, prefix, dtype, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["ckpt", "export", str(runs[STDIT]), "-o", str(out), "--weights", weights, "--dtype", dtype]) == 0
    assert "not Open-Sora" not in capsys.readouterr().out
    described = describe_checkpoint(runs[STDIT])
    model, _ = meta_model(described.config.model, described.config.objective, described.spec)
    read, report = read_open_sora(out, model)
    assert report.missing == report.unexpected == ()
    saved = tensors(runs[STDIT])
    buffers = {name for name, _ in model.named_buffers()}
    assert read.keys() == model.state_dict().keys()
    for name, tensor in read.items():
        expected = saved[("model." if name in buffers else prefix) + name].to(getattr(torch, dtype))
        assert torch.equal(tensor, expected), name
    assert any(not torch.equal(saved[f"ema.{n}"], saved[f"model.{n}"]) for n, _ in model.named_parameters())
    with safe_open(out, framework="pt") as file:
        said = file.metadata()
    assert {k: said[k] for k in ("weights", "dtype", "step", "model")} == {
        "weights": weights,
        "dtype": dtype,
        "step": "4",
        "model": "stdit",
    }
    assert len(said["config_hash"]) == 16
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_an_export_says_what_open_sora_has_no_counterpart_of(runs, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["ckpt", "export", str(runs[DIT]), "-o", str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [d.partition(":")[0] for d in done["differences"]] == [
        "model.name=dit",
        "model.pooled_text=true",
        "objective.name=rectified_flow",
    ]
    with safe_open(out, framework="pt") as file:
        assert {"y_pool.weight", "y_pool.bias"} <= set(file.keys())


def test_an_export_takes_the_newest_that_verifies_and_refuses_a_damaged_step(run, tmp_path, capsys):
    _damage(run)
    out = tmp_path / "weights.safetensors"
    assert main(["ckpt", "export", str(run), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    out.unlink()
    assert main(["ckpt", "export", str(run / "checkpoints" / step_name(4)), "-o", str(out)]) == 1
    assert "does not verify" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["ls", "{tmp}/nothing"], 1, "no such folder"),
        (["verify", "{tmp}"], 1, "no checkpoint"),
        (["export", "{run}", "-o", "{tmp}/weights.pt"], 2, "name it weights.safetensors"),
    ],
)
def test_what_cannot_be_done_is_said(runs, tmp_path, capsys, args, code, said):
    assert main(["ckpt", *(a.format(tmp=tmp_path, run=runs[STDIT]) for a in args)]) == code
    assert said in capsys.readouterr().err
