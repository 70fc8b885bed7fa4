"""What Colossal-AI can't do is said before any rank starts, with the way out."""

from __future__ import annotations

import importlib.util

import pytest

from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes import train as recipe

COLOSSALAI = "parallel.zero.backend=colossalai"


@pytest.fixture
def problems(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    # As it is where the package isn't installed, wherever this runs.
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "colossalai" else found(name, *rest))

    def of(*overrides, run=recipe.check):
        with pytest.raises(ConfigError) as error:
            run(None, overrides=["data.path=.", f"run.dir={tmp_path / 'run'}", COLOSSALAI, *overrides])
        assert not (tmp_path / "run").exists()
        return error.value.problems

    return of


def test_a_missing_package_is_named_before_any_rank_starts_with_the_way_out(problems, monkeypatch):
    monkeypatch.setattr(recipe, "run_ranks", lambda *args, **kwargs: pytest.fail("ranks were started"))
    (said,) = [p for p in problems("parallel.nproc=2", "parallel.zero.stage=2", run=recipe.train) if "isn't installed" in p]
    assert all(what in said for what in (COLOSSALAI, "requirements/colossalai.txt", "parallel.zero.backend=native")), said


def test_a_cpu_is_refused(problems):
    (said,) = [p for p in problems("parallel.zero.stage=2", "run.device=cpu") if "run.device" in p]
    assert "CUDA" in said and "native" in said


@pytest.mark.parametrize(
    "overrides, field, way_out",
    [
        (["parallel.zero.stage=0"], "parallel.zero.stage=0", "stage 1, 2 or 3"),
        (["parallel.zero.stage=1", "run.dtype=float64"], "run.dtype=float64", "float32 or bfloat16"),
        (["parallel.zero.stage=3"], "parallel.zero.stage=3 and run.dtype=float32", "run.dtype=bfloat16 or stage 2"),
        (["parallel.zero.stage=3", "parallel.nproc=2", "parallel.sp.degree=2"], "parallel.sp.degree=2", "stage 2"),
        (["parallel.zero.stage=2", "parallel.zero.offload=all"], "parallel.zero.offload=all", "offload=optimizer or stage 3"),
        (["parallel.zero.stage=2", "parallel.nproc=2", "parallel.dp_replicate=2"], "parallel.dp_replicate=2", "dp_replicate=1"),
        (["parallel.zero.stage=2", "parallel.nproc=2", "parallel.tp=2"], "parallel.tp=2", "tp=1"),
        (["parallel.zero.stage=2", "parallel.zero.nvme_path=swap"], "parallel.zero.nvme_path='swap'", "deepspeed"),
    ],
)
def test_what_it_cannot_do_is_refused_with_field_value_and_way_out(problems, overrides, field, way_out):
    (said,) = [p for p in problems(*overrides) if field in p and COLOSSALAI in p]
    assert way_out in said
