"""Configs: one parent, overrides, and every problem at once with its way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_dist.config.describe import describe
from opensora_dist.config.load import dump_yaml, load_config, parse_yaml
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems, train_problems
from opensora_dist.config.train import IddpmConfig, RectifiedFlowConfig, TrainConfig
from opensora_dist.core.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems_of(*overrides: str, path: Path | None = None, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, overrides=overrides, rules=lambda c: train_problems(c, world=world))
    return caught.value.problems


def test_five_mistakes_are_reported_at_once_each_with_its_way_out(tmp_path):
    path = write(
        tmp_path / "wrong.yaml",
        "run: {steps: -5, nmae: x}\nmodel: {width: 100, heads: 7}\ndata: {path: nowhere, global_batch: 7}\noptim: {lr: fast}\n",
    )
    problems = problems_of("parallel.grad_accum=2", path=path)
    assert len(problems) == 6
    for field, way_out in {
        "run.steps=-5": "use 1 or more",
        "run.nmae='x'": "did you mean 'name'?",
        "optim.lr='fast'": "write a number",
        "model.heads=7": "use one of [1, 2, 4, 5, 10]",
        "data.path='nowhere'": "opensora-dist data prepare",
        "data.global_batch=7": "use 8 or 6",
    }.items():
        assert any(p.startswith(field) and way_out in p for p in problems), (field, problems)


def test_rules_on_a_wrong_field_wait_until_the_field_is_right():
    problems = problems_of("data.global_batch=many", "data.path=.", "parallel.grad_accum=3")
    assert len(problems) == 1
    assert problems[0].startswith("data.global_batch='many'")
    assert problems[0].endswith("write a whole number")


@pytest.mark.parametrize(
    "override, said",
    [
        ("objective.name=rectifed_flow", "did you mean 'rectified_flow'?"),
        ("model.init_from={format: pixart}", "model.init_from.path is not set"),
        ("objective.name=ddpm", "objective.name='ddpm': must be one of 'iddpm', 'rectified_flow'"),
        ("model.size=M", "must be one of 'S', 'B', 'L' or 'XL'"),
        ("parallel.zero.stage=4", "must be one of 0, 1, 2 or 3"),
        ("validation.clip=[16, 32]", "entry 3 is missing"),
        ("modle.size=S", "did you mean 'model'?"),
        ("objective.timesteps=10", "unknown key"),
        ("run.steps", "not of the form section.key=value"),
        ("run.steps=[", "not valid YAML"),
        ("optim.lr=.nan", "finite"),
        ("optim=3", "write a mapping"),
        ("objective={name: iddpm, timesteps: 20}", "objective.timesteps=20: input should be greater than or equal to 21; use 21"),
        ("run={1: 2}", "line 1: 1 is a key, but"),
        ("run={steps: 1, steps: 2}", "line 1: the key 'steps' was given in line 1 already"),
        ("run.name=2026-13-45", "put text in quotes"),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(override, said):
    problems = problems_of("data.path=.", "objective.name=rectified_flow", override)
    assert len(problems) == 1
    assert said in problems[0], problems


SP4 = ["parallel.sp.degree=4"]


@pytest.mark.parametrize(
    "overrides, world, field",
    [
        (["parallel.dp_replicate=3", "parallel.zero.stage=2", "data.global_batch=16"], 4, "parallel.dp_replicate=3"),
        (["parallel.dp_replicate=2"], 2, "parallel.dp_replicate=2"),
        (["parallel.sp.degree=3"], 4, "parallel.sp.degree=3"),
        (["parallel.sp.degree=4", "parallel.dp_replicate=2", "parallel.zero.stage=3"], 4, "parallel.dp_replicate=2 x"),
        ([*SP4, "parallel.sp.ulysses=3"], 4, "parallel.sp.ulysses=3 must divide"),
        ([*SP4, "parallel.sp.ulysses=2"], 4, "parallel.sp.ulysses=2 is less than"),
        ([*SP4, "parallel.sp.scheme=ring", "parallel.sp.ulysses=2"], 4, "parallel.sp.ulysses=2 with parallel.sp.scheme=ring"),
        ([*SP4, "parallel.sp.min_degree=2"], 4, "parallel.sp.min_degree=2 is a choice for parallel.sp.scheme=auto"),
        ([*SP4, "parallel.sp.scheme=auto", "parallel.sp.min_degree=3"], 4, "parallel.sp.min_degree=3 must divide"),
        ([*SP4, "parallel.sp.scheme=auto", "parallel.sp.min_degree=1", "data.global_batch=2"], 4, "data.global_batch=2"),
        (["parallel.sp.degree=2", "data.global_batch=3"], 4, "data.global_batch=3"),
        (["optim.warmup_steps=9", "run.steps=5"], 1, "optim.warmup_steps=9"),
        (["optim.betas=[0.9, 1.0]"], 1, "optim.betas"),
        (["validation.every_steps=5"], 1, "validation.every_steps=5"),
        (["model.patch=[1, 0, 2]"], 1, "model.patch"),
        (["model.width=90", "model.heads=9"], 1, "model.width=90"),
        (["model.init_from={path: w.pth}", "model.name=dit"], 1, "model.init_from loads STDiT weights"),
        (["data.global_batch=6"], 4, "data.global_batch=6"),
    ],
)
def test_each_cross_field_rule_is_kept(overrides, world, field):
    problems = problems_of("data.path=.", *overrides, world=world)
    assert len(problems) == 1
    assert problems[0].startswith(field), problems


MIXTURE = "data.mixture=[{path: ., name: a}, {path: ./, name: b}]"


@pytest.mark.parametrize(
    "overrides, field, way_out",
    [
        ([], "data.path is not set", "data.mixture"),
        (["data.path=nowhere"], "data.path='nowhere' is not a folder", "data prepare"),
        (["data.path=nowhere/x-{0..3}.tar"], "data.path='nowhere/x-{0..3}.tar'", "correct the path"),
        (["data.path=.", MIXTURE], "data.path='.' and data.mixture of 2 are both set", "keep one of them"),
        ([MIXTURE, "data.layout=x.yaml"], "data.layout='x.yaml' is of data.path", "a layout of its own"),
        (["data.mixture=[{path: nowhere}, {path: ., name: b}]"], "data.mixture[0].path='nowhere'", "correct the path"),
        (
            ["data.mixture=[{path: ., name: a}, {path: ., name: a}]"],
            "data.mixture has 2 data sets named 'a'",
            "a name of its own",
        ),
        (["data.mixture=[{path: ., name: a/b}]"], "data.mixture has a data set named 'a/b'", "no slash"),
        (["data.mixture=[{path: ., name: a, weight: 2}, {path: ., name: b}]"], "data.mixture gives no weight to b", "or none"),
        (["data.path='pipe:cat x.tar'"], "data.path='pipe:cat", "data.allow_pipe=true"),
        (["data.path=s3://user:key@bucket/x"], "data.path='s3://...@bucket/x' holds a user or password", "$NAME"),
        (["data.path=.", "data.unit_tokens=64"], "data.unit_tokens=64 with data.batching=samples", "tokens or packed"),
        (["data.path=.", "data.batching=packed"], "data.batching=packed needs data.unit_tokens", "data.batching=samples"),
        (["data.path=.", "data.batching=tokens"], "data.batching=tokens needs data.unit_tokens", "your largest clip"),
        (
            ["data.path=.", "data.batching=packed", "data.unit_tokens=9", "data.global_batch=3", "parallel.grad_accum=2"],
            "data.global_batch=3 units of data.batching=packed must be a multiple",
            "use 4 or 2",
        ),
        (["data.path=.", "data.image_share=1.5"], "data.image_share=1.5", "use 1"),
    ],
)
def test_a_rule_of_data_names_its_field_and_its_way_out(overrides, field, way_out):
    (problem,) = problems_of(*overrides)
    assert problem.startswith(field) and way_out in problem, problem


def test_rules_of_data_are_reported_at_once():
    problems = problems_of(
        "data.path=nowhere",
        MIXTURE,
        "data.layout=x",
        "data.batching=packed",
        "data.global_batch=3",
        "parallel.sp={scheme: auto, degree: 4, min_degree: 2}",
        world=4,
    )
    assert [p.partition(" ")[0].partition("=")[0] for p in problems] == [
        "data.path", "data.layout", "data.batching", "data.global_batch", "data.batching",
    ]  # fmt: skip


def test_auto_may_not_share_the_samples_of_a_pack_among_different_numbers_of_ranks():
    packed = ["data.path=.", "data.batching=packed", "data.unit_tokens=64", "parallel.sp.scheme=auto", "parallel.sp.degree=4"]
    (problem,) = problems_of(*packed, "parallel.sp.min_degree=1", world=4)
    assert problem.startswith("data.batching=packed with parallel.sp.min_degree=1 below parallel.sp.degree=4")
    assert "use parallel.sp.min_degree=4 or none, or data.batching=tokens" in problem
    for allowed in ([], ["parallel.sp.min_degree=4"], ["parallel.sp.min_degree=2", "data.batching=tokens"]):
        load_config(TrainConfig, None, overrides=[*packed, *allowed], rules=lambda c: train_problems(c, world=4))


@pytest.mark.parametrize(
    "overrides",
    [
        [MIXTURE],
        ["data.mixture=[{path: ., name: a, weight: 2}, {path: ., name: b, weight: 1}]"],
        ["data.path=s3://bucket/x"],
        ["data.path='pipe:cat x.tar'", "data.allow_pipe=true"],
        ["data.path=.", "data.image_share=0"],
        ["data.path=.", "data.image_share=1", "data.batching=tokens", "data.unit_tokens=1"],
    ],
)
def test_what_section_data_may_say(overrides):
    load_config(TrainConfig, None, overrides=overrides, rules=lambda c: train_problems(c, world=1))


def test_ranks_that_share_samples_need_fewer_of_them():
    layouts = (
        [*SP4, "data.global_batch=1"],
        ["parallel.sp.degree=2", "data.global_batch=2"],
        ["parallel.sp.degree=2", "parallel.dp_replicate=2", "parallel.zero.stage=2", "data.global_batch=2"],
        [*SP4, "parallel.sp.scheme=usp", "parallel.sp.ulysses=2"],
        [*SP4, "parallel.sp.scheme=ring", "parallel.sp.ulysses=1"],
        [*SP4, "parallel.sp.scheme=ring", "parallel.sp.chunks=3", "parallel.sp.fastseq_dw=keep"],
        [*SP4, "parallel.sp.scheme=auto", "parallel.sp.min_degree=2", "data.global_batch=2"],
    )
    for overrides in layouts:
        load_config(TrainConfig, None, overrides=["data.path=.", *overrides], rules=lambda c: train_problems(c, world=4))


TP = ["data.path=.", "parallel.tp=2", "parallel.zero.stage=2"]


@pytest.mark.parametrize(
    "overrides, world, says, way_out",
    [
        (["parallel.tp=4", "model.heads=8"], 6, "parallel.tp=4 must divide the 6 ranks", "use one of [1, 2, 3, 6]"),
        (["parallel.sp.degree=4"], 4, "parallel.sp.degree=4 x parallel.tp=2 = 8 must divide the 4 ranks", "parallel.tp from [1]"),
        (["parallel.zero.stage=0"], 2, "parallel.tp=2 with parallel.zero.stage=0", "parallel.zero.stage=1, 2 or 3"),
        (["model.heads=3"], 2, "parallel.tp=2 must divide model.heads=3", "use one of [1, 3]"),
        (["model.width=12", "model.heads=2", "model.mlp_ratio=1.25"], 2, "the MLP's hidden width, 15", "use one of [1]"),
        (["parallel.sp.degree=2", "parallel.sp.scheme=auto"], 4, "parallel.sp.scheme=auto", "name a scheme"),
        (["parallel.sp.degree=2", "parallel.sp.scheme=ulysses"], 4, "must divide the 3 of model.heads=6", "degree from [1, 3]"),
        (["parallel.sp.degree=2", "parallel.sp.scheme=usp", "model.name=dit"], 4, "parallel.sp.ulysses=2", "scheme=ring,"),
    ],
)
def test_what_ranks_of_tp_can_not_share_is_refused_with_a_way_out(overrides, world, says, way_out):
    (problem,) = [p for p in problems_of(*TP, *overrides, world=world) if "data.global_batch" not in p]
    assert says in problem.partition(";")[0] and way_out in problem.partition(";")[2], problem


def test_a_mesh_that_can_not_be_is_refused_with_every_reason_at_once():
    wrong = ["parallel.tp=4", "parallel.dp_replicate=5", "parallel.sp.degree=4", "parallel.sp.scheme=auto", "model.heads=3"]
    problems = problems_of("data.path=.", *wrong, "parallel.zero.backend=deepspeed", world=6)
    for reason in (
        "parallel.tp=4 must divide the 6 ranks",
        "parallel.dp_replicate=5 must divide the 6 ranks",
        "parallel.sp.degree=4 must divide the 6 ranks",
        "parallel.tp=4 must divide model.heads=3",
        "parallel.tp=4 with parallel.zero.stage=0",
        "parallel.dp_replicate=5 with parallel.zero.stage=0",
        "parallel.tp=4 with parallel.zero.backend=deepspeed",
        "parallel.tp=4 with parallel.sp.scheme=auto",
    ):
        assert sum(reason in p for p in problems) == 1, (reason, problems)


def test_a_layout_that_does_not_fit_names_the_numbers_that_do():
    (problem,) = problems_of("data.path=.", "parallel.zero.stage=2", "parallel.dp_replicate=4", "parallel.sp.degree=4", world=8)
    assert "dp_replicate from [1, 2]" in problem and "degree from [1, 2]" in problem
    (problem,) = problems_of("data.path=.", "parallel.sp.degree=2", "data.global_batch=5", "parallel.grad_accum=2", world=4)
    assert "(= 4 ranks / 2 that share a sample)" in problem and "use 8 or 4" in problem


def test_a_missing_data_path_says_how_to_make_one():
    (problem,) = problems_of()
    assert problem.startswith("data.path is not set")
    assert "opensora-dist data prepare" in problem


def test_extends_merges_one_parent_and_overrides_win(tmp_path):
    write(tmp_path / "base.yaml", "run: {steps: 7, seed: 3}\nobjective: {name: iddpm, timesteps: 50}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nrun: {seed: 4}\n")
    config = load_config(TrainConfig, child, overrides=["run.steps=9", "optim.lr=3e-4"])
    assert (config.run.steps, config.run.seed, config.optim.lr) == (9, 4, 3e-4)
    assert config.objective == IddpmConfig(timesteps=50)


def test_choosing_another_objective_drops_the_keys_of_the_old_one(tmp_path):
    write(tmp_path / "base.yaml", "objective: {name: iddpm, timesteps: 50}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nobjective: {name: rectified_flow}\n")
    assert load_config(TrainConfig, child).objective == RectifiedFlowConfig()


def test_a_circle_of_parents_and_a_missing_file_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(TrainConfig, tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"does not exist; recipes to start from are in configs/"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="a config is a mapping"):
        load_config(TrainConfig, write(tmp_path / "list.yaml", "- 1\n"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("1: 2\n", "line 1: 1 is a key, but keys are names"),
        ("run:\n  steps: 3\n  1: 2\n", "line 3: 1 is a key, but keys are names"),
        ("run: {[a]: 2}\n", "line 1: a list or mapping is a key"),
        ("run:\n  ~: 2\n", "line 2: ~ is a key"),
        ("run:\n  steps: 1\n  seed: 2\n  steps: 3\n", "line 4: the key 'steps' was given in line 2 already; keep one"),
        ("run: {steps: 1}\nrun: {seed: 1}\n", "line 2: the key 'run' was given in line 1 already"),
    ],
)
def test_a_key_that_is_no_text_or_comes_twice_is_named_with_its_file_and_line(tmp_path, text, said):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_merged_keys_may_be_given_again():
    text = "{one: &one {b: 1, c: 1}, two: {<<: *one, c: 3}}"
    assert parse_yaml(text, source="")["two"] == {"b": 1, "c": 3}


def test_a_file_that_is_not_utf_8_is_named_with_its_line_and_a_byte_order_mark_is_none_of_its_text(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_bytes("run:\n  name: Übung\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"wrong\.yaml: line 2 holds bytes that are not UTF-8 \(0xdc\); save the file as UTF-8"):
        load_config(TrainConfig, path)
    path.write_bytes("run:\n  name: Übung\n".encode("utf-8-sig"))
    assert load_config(TrainConfig, path).run.name == "Übung"


def test_words_that_yaml_1_1_takes_for_booleans_stay_words_and_exponents_are_numbers():
    assert parse_yaml("{a: off, b: no, c: 1e-4, d: true, e: 5}", source="") == {
        "a": "off",
        "b": "no",
        "c": 1e-4,
        "d": True,
        "e": 5,
    }
    assert load_config(TrainConfig, None, overrides=["track.wandb.mode=off"]).track.wandb.mode == "off"


def test_a_dumped_config_loads_to_the_same(tmp_path):
    config = load_config(
        TrainConfig,
        None,
        overrides=["objective.name=iddpm", "model.init_from={path: x.pth}", "validation.prompts=['off', 'a: b']"],
    )
    assert load_config(TrainConfig, write(tmp_path / "c.yaml", dump_yaml(config))) == config


def test_help_names_every_key_with_its_default():
    text = describe(TrainConfig)
    for section, field in TrainConfig.model_fields.items():
        assert f"{section}:" in text
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"  {key}:" in text
    assert "lr: 0.0001" in text


def test_prepare_rules_name_missing_folders_and_doubled_buckets(tmp_path):
    def problems(*overrides):
        with pytest.raises(ConfigError) as caught:
            load_config(PrepareConfig, None, overrides=overrides, rules=prepare_problems)
        return caught.value.problems

    assert [p.split()[0] for p in problems()] == ["input.path", "output.path"]
    (gone,) = problems(f"input.path={tmp_path}/none", "output.path=x")
    assert "is not a folder" in gone
    (twice,) = problems(f"input.path={tmp_path}", "output.path=x", "clip.buckets=[[1, 8, 8], [1, 8, 8]]")
    assert "twice" in twice
