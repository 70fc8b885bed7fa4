"""Every scheme sends the bytes of its formula, forward and backward, and nothing else is sent.

Counted where this package hands tensors to torch.distributed's functions, which know nothing of the formulas.
"""

from __future__ import annotations

import itertools
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sequence_cases import SHAPES, Case, Meshes, cases, compute, covering, make_inputs, make_model, rows

from opensora_dist.core.types import Axis
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.traffic import SentBytes

_ELSE = re.compile("(all_|broadcast|gather|reduce|scatter|send|recv|barrier)")
"""Names in torch.distributed of what sends or waits, by how they begin."""


@dataclass
class Count:
    """Bytes this rank sent to others, by what sent them."""

    all_to_all: int = 0
    isend: int = 0

    @property
    def total(self):
        return self.all_to_all + self.isend


@contextmanager
def counted():
    """Counts what goes through torch.distributed; a collective that no scheme should use is an error."""
    count, all_to_all_single, batch_isend_irecv = Count(), dist.all_to_all_single, dist.batch_isend_irecv

    def counting_all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = input_split_sizes or [len(input) // size] * size
        count.all_to_all += (sum(rows) - rows[rank]) * input[:1].numel() * input.element_size() if len(input) else 0
        return all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op)

    def counting_batch(ops):
        sends = [op for op in ops if op.op is dist.isend]
        assert all(op.peer != dist.get_rank() for op in ops), "a rank sends to itself"
        count.isend += sum(op.tensor.numel() * op.tensor.element_size() for op in sends)
        return batch_isend_irecv(ops)

    def refuse(name):
        return mock.Mock(side_effect=AssertionError(f"torch.distributed.{name} in a model's forward or backward"))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", counting_all_to_all))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", counting_batch))
        for name in filter(_ELSE.match, set(dir(dist)) - {"all_to_all_single"}):
            stack.enter_context(mock.patch.object(dist, name, refuse(name)))
        yield count


@dataclass(frozen=True)
class Sent:
    """By a rank, in the whole model, and what the scheme says of one block."""

    forward: int
    backward: int
    formula_forward: int
    formula_backward: int


def _crossing(case, shard):
    return Axis.JOINT if case.row.model == "dit" else Axis.SPACE if shard.by_rows else Axis.TIME


def count_cases(chosen, *, depth=2, dtype=torch.float64, autocast=False):
    """Of each case on this rank."""
    meshes, found = Meshes(), []
    for case in chosen:
        mesh, shard = meshes.shard(case)
        shape = SHAPES[case.shape]
        model = make_model(case.row.model, shape, depth=depth).to(dtype)
        for block in model.blocks:
            block.recompute = case.recompute
        inputs, marks = make_inputs(shape, group=mesh.rank // mesh.sp_size, dtype=dtype), []
        with counted() as count, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            compute(model, inputs, shard=shard, between=lambda: marks.append(count.total))
        formula = shard.scheme.bytes_sent(
            shard,
            _crossing(case, shard),
            batch=shape.batch,
            width=shape.width,
            element_bytes=2 if autocast else torch.empty((), dtype=dtype).element_size(),
        )
        found.append(Sent(marks[0], count.total - marks[0], formula.forward, formula.backward))
    return found


def count_in_bfloat16(chosen):
    """One block under autocast."""
    return count_cases(chosen, depth=1, dtype=torch.float32, autocast=True)


def _chosen(scheme, world, *, shapes, every=cases):
    """What the rules allow, on one group of ranks."""
    found = [case for row in rows() if (row.scheme, row.world, row.groups) == (scheme, world, 1) for case in every(row)]
    return [case for case in found if case.shape in shapes and not case.problems]


WORLDS = [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] == 3)) for pair in itertools.product(SCHEMES, (2, 3, 4))]


@pytest.fixture(scope="module")
def sent(ranks):
    """By scheme and world, of two blocks: an even and an uneven shape in every way but chunks, a few of all."""

    @cache
    def of(scheme, world):
        chosen = [case for case in _chosen(scheme, world, shapes=("even", "uneven")) if dict(case.options).get("chunks", 1) == 1]
        chosen += _chosen(scheme, world, shapes=SHAPES, every=covering)
        return [(case, sent) for of_rank in ranks.run(count_cases, chosen, world=world) for case, sent in zip(chosen, of_rank)]

    return of


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_a_model_of_two_blocks_sends_twice_the_formula_and_nothing_at_its_edges(sent, scheme, world):
    """Patch embedding, captions, timestep, cross-attention and the final layer send nothing. Under recompute nothing is sent twice."""
    wrong = [
        f"{case}: {found}"
        for case, found in sent(scheme, world)
        if (found.forward, found.backward) != (2 * found.formula_forward, 2 * found.formula_backward)
    ]
    assert sent(scheme, world) and not wrong


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheme, world", WORLDS)
def test_one_block_sends_the_formula_in_every_case_of_the_full_grid(ranks, scheme, world):
    chosen = _chosen(scheme, world, shapes=SHAPES)
    for of_rank in ranks.run(count_one_block, chosen, world=world, limit_s=600):
        for case, found in zip(chosen, of_rank, strict=True):
            assert (found.forward, found.backward) == (found.formula_forward, found.formula_backward), case


def count_one_block(chosen):
    """A model of one."""
    return count_cases(chosen, depth=1)


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_under_autocast_bfloat16_travels(ranks, scheme, world):
    """Gradients that a ring adds up travel in float32."""
    chosen = _chosen(scheme, world, shapes=("even", "uneven", "one frame"), every=covering)
    for of_rank in ranks.run(count_in_bfloat16, chosen, world=world):
        for case, found in zip(chosen, of_rank, strict=True):
            assert (found.forward, found.backward) == (found.formula_forward, found.formula_backward), case
            if case.shape == "even":
                assert (found.forward, found.backward) == closed(case, element_bytes=2, sum_bytes=4), case


def count_twice(chosen):
    """Of each case: what the functions of torch.distributed were given, and what the operators that torch makes of them send."""
    meshes, found = Meshes(), []
    for case in chosen:
        mesh, shard = meshes.shard(case)
        model, inputs = (
            make_model(case.row.model, SHAPES[case.shape]),
            make_inputs(SHAPES[case.shape], group=mesh.rank // mesh.sp_size),
        )
        with SentBytes() as operators, counted() as functions:
            compute(model, inputs, shard=shard)
        found.append((functions.total, operators.total))
    return found


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_the_counter_of_operators_that_benchmarks_use_counts_the_same(ranks, scheme, world):
    chosen = _chosen(scheme, world, shapes=("two captions",), every=covering)
    assert chosen
    for of_rank in ranks.run(count_twice, chosen, world=world):
        assert all(functions == operators > 0 for functions, operators in of_rank), of_rank


# --- the closed formulas, as numbers that no code of the package takes part in


def closed(case: Case, *, element_bytes: int = 8, sum_bytes: int = 8) -> tuple[Fraction, Fraction]:
    """Bytes a rank sends forward and backward in one block, where everything divides: the table of docs/sequence.md.

    Args:
        sum_bytes: Of an element of the gradient that goes around a ring.
    """
    shape, P = SHAPES[case.shape], case.row.size
    M = shape.batch * shape.grid.volume * shape.width * element_bytes
    ring_backward = 2 + Fraction(2 * sum_bytes, element_bytes)
    mu, options = Fraction(P - 1, P), dict(case.options)
    match case.row.scheme:
        case "dsp":
            return 2 * Fraction(P - 1, P * P) * M, 2 * Fraction(P - 1, P * P) * M
        case "ulysses":
            return 4 * mu * M / P, 4 * mu * M / P
        case "fastseq":
            once = mu * M * (1 + Fraction(1, P))
            return once, once + (mu * M if options["fastseq_dw"] == "gather" else 0)
        case "ring":
            return 2 * mu * M, ring_backward * mu * M
        case "allgather":
            return 2 * mu * M, 3 * mu * M
        case "usp":
            u = options["ulysses"]
            r = P // u
            inside = Fraction(4 * (u - 1), u)
            return Fraction(M, P) * (inside + 2 * (r - 1)), Fraction(M, P) * (inside + ring_backward * (r - 1))
    raise AssertionError(f"write down what {case.row.scheme} sends, here and in docs/sequence.md")


@pytest.mark.parametrize("scheme, world", WORLDS)
def test_even_sizes_send_the_closed_formula_of_the_docs(sent, scheme, world):
    even = [(case, found) for case, found in sent(scheme, world) if case.shape == "even"]
    assert even
    for case, found in even:
        assert (found.forward, found.backward) == tuple(2 * n for n in closed(case)), case


def test_the_closed_formula_of_dsp_by_hand():
    """144 tokens of width 24 in float64 are 27,648 bytes; each of 4 ranks sends 2 x 3/16 of them."""
    case = next(iter(_chosen("dsp", 4, shapes=("even",))))
    assert closed(case) == (10_368, 10_368)
