"""What keeps ranks from sharing the samples of a data set is said before one starts, with the rule and what would work."""

from __future__ import annotations

import pytest
from dataset_factory import write_dataset

from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes.train import check

# Tokens under the default patch: 3x2x3 and 1x3x2.
SAMPLES = {(3, 32, 48): 8, (1, 48, 32): 8}
MODEL = ["model.depth=1", "model.width=24", "model.heads=6", "run.device=cpu", "data.global_batch=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture
def problems(data, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def of(*overrides, degree):
        ranks = [f"parallel.nproc={degree}", f"parallel.sp.degree={degree}"]
        try:
            check(None, overrides=[f"data.path={data}", f"run.dir={tmp_path}", *MODEL, *ranks, *overrides])
        except ConfigError as error:
            return error.problems
        return []

    return of


@pytest.mark.parametrize("scheme", ["ulysses", "fastseq", "allgather", "usp"])
def test_heads_that_the_ranks_do_not_divide_are_named_with_the_divisors_and_a_scheme_that_works(problems, scheme):
    (said,) = problems(f"parallel.sp.scheme={scheme}", "model.heads=4", degree=3)
    assert "3 must divide model.heads=4" in said
    assert "use one of 1" in said and "parallel.sp.scheme=dsp or ring" in said
    assert said.endswith("(clips of 1x48x32, clips of 3x32x48)")
    assert problems("parallel.sp.scheme=ring", "model.heads=4", degree=3) == []
    assert problems(f"parallel.sp.scheme={scheme}", degree=3) == []


def test_dsp_is_refused_for_joint_attention_and_named_with_what_takes_its_place(problems):
    (said,) = problems("model.name=dit", degree=2)
    assert said.startswith("parallel.sp.scheme=dsp") and "use parallel.sp.scheme=ring or ulysses" in said
    assert problems("model.name=dit", "parallel.sp.scheme=ulysses", degree=2) == []


def test_more_ranks_than_frames_and_rows_are_refused_for_the_clips_and_for_the_validation_clip(problems):
    validation = ["validation.every_steps=1", "validation.prompts=[a]", "validation.clip=[1, 32, 64]"]
    assert problems(*validation, degree=2) == []
    said = problems(*validation, degree=4)
    assert [p.partition(":")[0] for p in said] == ["parallel.sp.degree=4"] * 3
    assert "3x2x3 tokens" in said[1] and "use parallel.sp.degree=3 or less" in said[1] and said[1].endswith("(clips of 3x32x48)")
    assert said[2].endswith("(validation.clip=[1, 32, 64])")


def test_the_largest_clips_which_validation_draws_by_default_are_asked_too_where_they_fill_no_batch(problems, tmp_path):
    write_dataset(tmp_path / "wide", samples={(3, 32, 48): 8, (1, 16, 512): 2})
    wide = [f"data.path={tmp_path / 'wide'}", "validation.every_steps=1", "validation.prompts=[a]"]
    (said,) = problems(*wide, degree=3)
    assert said.startswith("parallel.sp.degree=3") and "validation.clip=[1, 16, 512], by default the largest clips" in said
    assert problems(*wide, "validation.clip=[3, 32, 48]", degree=3) == []


def test_a_network_file_that_only_auto_would_read_is_refused_with_another_scheme(problems):
    (said,) = problems("parallel.sp.network=network.json", degree=2)
    assert said.startswith("parallel.sp.network='network.json'") and "the scheme is dsp" in said


def test_auto_asks_for_no_more_than_its_least_degree_and_a_network_file_that_can_be_read(problems, tmp_path):
    auto = ["parallel.sp.scheme=auto", "data.global_batch=8"]
    assert problems(*auto, degree=3) == []
    assert len(problems(*auto, degree=4)) == 2
    assert problems(*auto, "parallel.sp.min_degree=2", degree=4) == []
    (said,) = problems(*auto, f"parallel.sp.network={tmp_path}/none.json", degree=2)
    assert "can't be read" in said and "bench network" in said


def test_clips_that_fill_no_batch_are_no_reason_to_refuse(problems, tmp_path):
    write_dataset(tmp_path / "few", samples={(3, 32, 48): 8, (1, 32, 32): 2})
    assert problems(f"data.path={tmp_path / 'few'}", degree=3) == []


def test_what_leaves_no_bucket_to_train_on_is_said_with_each_bucket_before_a_rank_starts(problems):
    (said,) = problems("data.global_batch=9", degree=1)
    assert "data.global_batch=9" in said and "3x32x48: 8 of 9" in said and "1x48x32: 8 of 9" in said
    (said,) = problems("data.batching=packed", "data.unit_tokens=12", degree=1)
    assert "data.unit_tokens=12" in said and "3x32x48" in said and "18" in said
    assert problems("data.batching=packed", "data.unit_tokens=18", degree=2) == []


def test_ranks_that_cannot_share_a_sample_of_a_pack_are_named_as_without_packs(problems):
    (said,) = problems("data.batching=packed", "data.unit_tokens=64", "model.name=dit", degree=2)
    assert said.startswith("parallel.sp.scheme=dsp needs attention in two parts")
