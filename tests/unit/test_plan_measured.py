"""Plans and steps that were timed: where a plan's efficiency comes from, and that what isn't a step is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from opensora_dist.cli.main import main
from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.plan.hardware import gpu_of
from opensora_dist.plan.measured import read_timed
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.plan.time import Machine, step_time
from opensora_dist.recipes import plan as recipe
from opensora_dist.recipes.bench.step import FormResult, StepOptions, Variant
from opensora_dist.recipes.bench.step_forms import FORMS, case_of_form, compiles, form_of
from opensora_dist.recipes.bench.step_show import step_record, work_of
from opensora_dist.recipes.plan_use import attention_ratio_of, cost_of, use_of

RECIPE = Path("configs/train/open_sora_1_0_64x512x512.yaml")
H800 = Machine(gpu=gpu_of("h800"), gpus=1, per_node=1)


def case_of(**changes) -> MemoryCase:
    given = {"model": ModelConfig(size="XL"), "parallel": ParallelConfig(), "latent": Thw(16, 32, 32), "dtype": "bfloat16"}
    return MemoryCase(**{**given, "world": 1, **changes})


def write(
    path: Path,
    case: MemoryCase,
    *,
    use: float,
    attention_use: float | None = None,
    gpu: str = "NVIDIA H800",
    device: str = "cuda",
) -> None:
    """What ``bench step`` would have written on a GPU that is as a plan has it."""
    took = step_time(case, cost_of(case), replace(H800, use=use, attention_use=attention_use)).total_s
    result = FormResult(variant=Variant(case=case), form="eager", difference=0.0, memory_bytes=1 << 30, seconds=(took,) * 3)
    record = step_record([result], options=StepOptions(), works=[work_of(case, peak_flops=H800.gpu.flops_per_s)], device=device)
    record["environment"]["gpus"] = [gpu]
    path.write_text(json.dumps(record))


def test_the_use_that_a_timed_step_reached_gives_its_time_again(tmp_path):
    write(tmp_path / "step.json", case_of(), use=0.31)
    (timed,) = read_timed(tmp_path)
    assert timed.cuda and timed.case == case_of() and use_of(timed, H800) == pytest.approx(0.31)
    assert use_of(replace(timed, step_s=1e-9), H800) is None


def test_two_steps_tell_products_from_attentions(tmp_path):
    cases = [case_of(), case_of(model=ModelConfig(name="dit", size="XL"))]
    for i, case in enumerate(cases):
        write(tmp_path / f"{i}.json", case, use=0.6, attention_use=0.2)
    first, second = read_timed(tmp_path)
    use, ratio = attention_ratio_of(first, second, H800)
    assert use == pytest.approx(0.6, rel=1e-3) and ratio == pytest.approx(1 / 3, rel=1e-3)


def test_a_plan_takes_the_use_of_the_nearest_step_on_its_gpu_and_names_it(tmp_path, capsys):
    write(tmp_path / "near.json", case_of(latent=Thw(64, 64, 64)), use=0.37)
    write(tmp_path / "small.json", case_of(model=ModelConfig(size="S")), use=0.11)
    write(tmp_path / "other.json", case_of(latent=Thw(64, 64, 64)), use=0.2, gpu="NVIDIA A100-SXM4-80GB")
    (tmp_path / "else.json").write_text(json.dumps({"kind": "sequence"}))
    command = ["plan", str(RECIPE), "--gpus", "8", "--gpu", "h800", "--latent", "64x64x64", "--measured", str(tmp_path), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["use"] == pytest.approx(0.37) and "near.json: eager" in found["use_from"]
    assert main(["plan", str(RECIPE), "--gpus", "8", "--gpu", "h200", "--latent", "16x32x32", *command[8:]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["use"] == 0.45 and "assumed" in found["use_from"] and "no step on a h200" in found["use_from"]


def test_a_step_on_the_cpu_of_a_machine_with_a_gpu_is_no_step_of_the_gpu(tmp_path):
    write(tmp_path / "step.json", case_of(), use=0.31, device="cpu")
    (timed,) = read_timed(tmp_path)
    assert not timed.cuda and timed.device != "NVIDIA H800"


@pytest.mark.parametrize("stored", ["nothing", "another format"])
def test_results_of_which_a_plan_can_use_none_leave_its_assumption_and_say_why(tmp_path, monkeypatch, capsys, stored):
    (tmp_path / "h800").mkdir()
    (tmp_path / "h800" / "kernels.json").write_text(json.dumps({"kind": "kernels"}))
    if stored == "another format":
        (tmp_path / "h800" / "step_a.json").write_text(json.dumps({"kind": "step", "format": 1, "results": []}))
    monkeypatch.setattr(recipe, "_RESULTS", tmp_path)
    command = ["plan", str(RECIPE), "--gpus", "8", "--gpu", "h800", "--latent", "16x32x32"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    why = "no step of" if stored == "nothing" else "format 1, and 3 is read here"
    assert found["machine"]["use"] == 0.45 and found["use_from"].startswith("assumed: ") and why in found["use_from"]
    assert main([*command, "--measured", str(tmp_path / "h800")]) == 2


def test_forms_and_runs_find_each_other():
    for form in FORMS:
        kernels = case_of_form(case_of(), form).kernels
        assert form_of(kernels, "blocks" if compiles(form) else "off") == form
    assert form_of("triton", "off") == "ours" and form_of("torch", "graphs") == "compile"


@pytest.mark.parametrize("change", ["format", "field", "seconds", "device"])
def test_a_step_that_another_version_wrote_is_refused(tmp_path, change):
    path = tmp_path / "step.json"
    write(path, case_of(), use=0.4)
    record = json.loads(path.read_text())
    if change == "format":
        record["format"] = 1
    elif change == "device":
        del record["device"]
    elif change == "field":
        record["results"][0]["case"]["warp"] = 9
    else:
        record["results"][0]["seconds"] = []
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="no step that this version measured"):
        read_timed(path)


def test_what_is_no_step_is_refused_where_it_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no step of"):
        read_timed(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"kind": "sequence", **asdict(StepOptions())}))
    with pytest.raises(ConfigError, match="is no record of"):
        read_timed(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"kind": "plan"}))
    with pytest.raises(ConfigError, match="has no steps"):
        read_timed(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_timed(tmp_path)
