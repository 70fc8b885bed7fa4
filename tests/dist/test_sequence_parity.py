"""Every sequence scheme is the same model as one process: outputs, every gradient, ten steps; or its rule says why not."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sequence_cases import (
    SHAPES,
    TOLERANCE,
    Case,
    Row,
    alternatives,
    cases,
    compare,
    covering,
    errors_over,
    rows,
    trajectories,
    worst,
)

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.layout import scheme_problems
from opensora_dist.parallel.sequence.registry import SCHEMES

PAGE = Path(__file__).parents[2] / "docs/sequence_parity.md"
ROWS = rows()
WORLDS = list(itertools.product(SCHEMES, (2, 3, 4)))
FORBIDDEN = [case for row in ROWS for case in cases(row) if case.problems]


def _errors(ranks, chosen):
    """By case, over ranks. One call of the pool runs all cases of one scheme and world."""
    found = {}
    for (_, world), group in itertools.groupby(chosen, key=lambda case: (case.row.scheme, case.row.world)):
        allowed = [case for case in group if not case.problems]
        if allowed:
            by_rank = ranks.run(compare, allowed, world=world, limit_s=1800)
            found |= {case: errors_over(errors) for case, *errors in zip(allowed, *by_rank, strict=True)}
    return found


def _too_large(found):
    return {str(case): asdict(errors) for case, errors in found.items() if not errors.worst <= TOLERANCE}


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_a_scheme_gives_the_outputs_and_every_gradient_of_one_process(ranks, scheme, world):
    chosen = [case for row in ROWS if (row.scheme, row.world) == (scheme, world) for case in covering(row)]
    found = _errors(ranks, chosen)
    assert found and not _too_large(found)


def _values(chosen):
    """What recompute and each option take on among these cases."""
    return {(name, value) for case in chosen for name, value in (("recompute", case.recompute), *case.options)}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_covering_cases_hold_every_shape_and_every_value_of_every_option(row):
    allowed, chosen = ([case for case in some if not case.problems] for some in (cases(row), covering(row)))
    assert {case.shape for case in chosen} == {case.shape for case in allowed}
    assert _values(chosen) == _values(allowed)


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_ten_steps_of_adamw_are_those_of_one_process(ranks, scheme, world):
    chosen = [case for row in ROWS if (row.scheme, row.world) == (scheme, world) for case in covering(row)]
    chosen = [case for case in chosen if case.shape == "two captions" and not case.problems]
    assert chosen
    for of_rank in ranks.run(trajectories, chosen, world=world):
        for case, found in zip(chosen, of_rank, strict=True):
            assert found["losses"] <= 1e-11 and found["weights"] <= 1e-11, (case, found)


# --- what the rules forbid


def test_a_forbidden_case_is_found_without_a_process_group_and_says_which_scheme_would_do():
    assert not dist.is_initialized()
    assert len({case.row.scheme for case in FORBIDDEN}) > 1
    for case in FORBIDDEN:
        for problem in case.problems:
            assert re.match(rf"parallel\.sp\.(scheme={case.row.scheme}|ulysses=\d+|degree=\d+)\b", problem), problem
            assert ";" in problem, f"no way out: {problem}"
            named, shape = alternatives(problem), SHAPES[case.shape]
            assert named, f"no scheme that would do: {problem}"
            for name in named:
                sp = case.sp.model_copy(update={"scheme": name})
                left = scheme_problems(sp, shape.grid, heads=shape.heads, joint=case.row.model == "dit")
                assert not left, f"{problem!r} sends to {name}, which says {left}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sample_with_fewer_frames_and_rows_than_ranks_is_sent_to_a_degree_that_fits(scheme):
    (problem,) = scheme_problems(SpConfig(scheme=scheme, degree=4), Thw(2, 3, 9), heads=12, joint=False)
    degree = int(re.search(r"; use parallel\.sp\.degree=(\d+)", problem)[1])
    assert "parallel.sp.degree=4" in problem and "2x3x9" in problem
    assert not scheme_problems(SpConfig(scheme=scheme, degree=degree), Thw(2, 3, 9), heads=12, joint=False)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_heads_that_do_not_divide_are_forbidden_by_name_or_allowed_by_parity(row):
    """What is allowed is in the covering cases under the shape "odd heads"."""
    for case in cases(row):
        if case.shape == "odd heads" and case.problems:
            assert any("heads=5" in problem or "model.name=dit" in problem for problem in case.problems), case.problems


# --- the comparison itself


class _ScaledBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _wrong_in_backward(case):
    """The case, where rank 1 makes its gradients of the crossing attention a thousandth too large."""
    real = type(SCHEMES[case.row.scheme](case.sp)).branch

    def branch(self, attn, x, axis, shard, **parts):
        if self.name != "local" and shard.rank == 1:
            before = parts["before"]
            parts["before"] = lambda x, frames: _ScaledBack.apply(before(x, frames), 1.001)
        return real(self, attn, x, axis, shard, **parts)

    with mock.patch.object(type(SCHEMES[case.row.scheme](case.sp)), "branch", branch):
        return compare([case])[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_comparison_sees_a_scheme_that_is_wrong_in_backward_only(ranks, scheme):
    case = next(c for row in ROWS if row.scheme == scheme for c in cases(row) if not c.problems and c.shape == "two captions")
    found = errors_over(ranks.run(_wrong_in_backward, case, world=case.row.world))
    assert found.output <= TOLERANCE
    assert min(found.dx, found.grads, found.text, found.timestep) > 1e-7, found


# --- the table


def _table(found):
    """The result table: of each row its worst error and its cases, or the rule that forbids it."""
    lines = [
        "| scheme | model | ranks per sample | world | cases | worst error | forbidden |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        errors = [found[case].worst for case in cases(row) if not case.problems]
        lines.append(_line(row, f"{worst(errors):.0e}" if errors else "-"))
    return "\n".join(lines)


def _line(row: Row, error: str) -> str:
    full = cases(row)
    refused = [case for case in full if case.problems]
    rules = sorted({f"{_who(refused, row, case)}: {problem.partition(';')[0]}" for case in refused for problem in case.problems})
    return (
        f"| {row.scheme} | {row.model} | {row.size} | {row.world} | {len(full) - len(refused)} | {error} | {'; '.join(rules)} |"
    )


def _who(refused: list[Case], row: Row, case: Case) -> str:
    return "all" if len(refused) == len(cases(row)) else f"`{case.shape}`"


def test_the_table_in_the_docs_lists_every_row_with_its_cases_or_its_rule():
    found = re.findall(r"^\| \w+ \| (?:st)?dit \|.*\|$", PAGE.read_text(), re.MULTILINE)
    errors = [line.split(" | ")[5] for line in found]
    assert [line.replace(f" | {error} | ", " | ? | ") for line, error in zip(found, errors)] == [_line(row, "?") for row in ROWS]
    assert all(error == "-" or float(error) <= TOLERANCE for error in errors)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_grid_matches_one_process_and_is_what_the_docs_list(ranks):
    """Writes the docs' table into the file that OPENSORA_PARITY_TABLE names, if it does."""
    found = _errors(ranks, [case for row in sorted(ROWS, key=lambda row: (row.scheme, row.world)) for case in cases(row)])
    assert not _too_large(found)
    assert len(found) + len(FORBIDDEN) == sum(len(cases(row)) for row in ROWS)
    if path := os.environ.get("OPENSORA_PARITY_TABLE"):
        _write(Path(path), _table(found))


def _write(path: Path, table: str) -> None:
    head, end = "<!-- the table below is written by the test -->\n", "<!-- end of the table -->"
    text = path.read_text()
    before, after = text.split(head)[0], text.split(end)[1]
    path.write_text(f"{before}{head}\n{table}\n\n{end}{after}")
