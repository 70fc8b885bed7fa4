"""Times one block under every sequence scheme that fits, interleaved: ranks meet before each pass, and the slowest rank's time counts."""

# B batch, T frames, S tokens per frame, D width; t, s: of this rank

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.types import Region, Thw
from opensora_dist.parallel.mesh import build_mesh, sp_ulysses
from opensora_dist.parallel.sequence.base import Links, Scheme, Shard, Traffic
from opensora_dist.parallel.sequence.layout import cut, scheme_problems
from opensora_dist.parallel.sequence.local import Local, whole
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.recipes.bench.case import SequenceCase, Subject
from opensora_dist.recipes.bench.forms import PACKAGES, package_missing, silent
from opensora_dist.recipes.bench.memory import peak_memory
from opensora_dist.recipes.bench.passes import Form, Pass, SequenceResult, timed_pass
from opensora_dist.recipes.bench.rounds import of_all_ranks, take_turns
from opensora_dist.recipes.bench.trace import write_trace

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float64": 1e-10}
"""Largest difference from the block on one process, over the largest value, by the case's dtype."""
_COMPARED = ("qkv.weight", "proj.weight")
"""Of the self-attentions, whose gradients are compared beside output and input gradient: a scheme has hands in both."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Args:
        schemes: Names, of the registry and of ``PACKAGES``; None takes all.
        rounds: Passes of each form that count.
        warmup: Passes of each form before them.
        sp: Chunks and the inner axis of the schemes that have them; the rest of it is not read.
        timeout_s: Of a collective.
    """

    schemes: tuple[str, ...] | None = None
    rounds: int = 9
    warmup: int = 2
    sp: SpConfig = field(default_factory=SpConfig)
    timeout_s: float = 600.0


def sequence_inputs(
    *,
    schemes: Sequence[str] | None,
    chunks: int | None,
    ulysses: int | None,
    fastseq_dw: str | None,
    rounds: int,
    warmup: int,
    timeout_s: float,
    world: int,
    grid: tuple[int, ...],
    **case: Any,
) -> tuple[SequenceCase, Options]:
    """A case and options from what a command line has.

    Args:
        world: Ranks that will run.
    Raises:
        ConfigError: Everything that is out of range.
    """
    known = (*SCHEMES, *PACKAGES)
    problems = [f"--schemes {name}: not known; use some of {', '.join(known)}" for name in schemes or () if name not in known]
    for flag, value, least in (("chunks", chunks, 1), ("rounds", rounds, 1), ("warmup", warmup, 0), ("ulysses", ulysses, 1)):
        if value is not None and value < least:
            problems.append(f"--{flag} must be {least} or more, and is {value}")
    if ulysses is not None and ulysses > 0 and world % ulysses:
        problems.append(f"--ulysses {ulysses} must divide the {world} ranks; use one of {', '.join(map(str, _divisors(world)))}")
    try:
        made = SequenceCase(grid=Thw(*grid), **case)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    given = {"chunks": chunks, "ulysses": ulysses, "fastseq_dw": fastseq_dw}
    sp = SpConfig.model_validate({key: value for key, value in given.items() if value is not None})
    return made, Options(schemes=tuple(schemes) if schemes else None, rounds=rounds, warmup=warmup, sp=sp, timeout_s=timeout_s)


def bench_sequence(
    case: SequenceCase,
    *,
    device: torch.device,
    options: Options,
    on_round: Callable[[int], None] | None = None,
    trace: Path | None = None,
) -> list[SequenceResult]:
    """Measures on all ranks of the process group, which share one sample batch; rank by rank the same result. Collective.

    Args:
        on_round: Told the rounds done, warm-up included.
        trace: This rank's file for one pass of each form, in Chrome's format.
    Raises:
        OpensoraError: A scheme computes something else than one process does.
    """
    forms, refused = make_forms(case, device=device, options=options)
    subject = Subject(case, device=device)
    everything = Region.whole(case.grid)
    wanted = _run(subject, whole(case.grid), subject.tokens("x", everything), subject.tokens("dy", everything))
    forms = [_examined(form, subject, wanted=wanted) for form in forms]
    del wanted
    passes = _rounds(forms, subject, options=options, on_round=on_round)
    if trace is not None:
        write_trace(trace, forms, subject)
    timed = [
        replace(form.result, passes=tuple(its), silent=tuple(silents)) for form, (its, silents) in zip(forms, passes, strict=True)
    ]
    return timed + refused


def make_forms(case: SequenceCase, *, device: torch.device, options: Options) -> tuple[list[Form], list[SequenceResult]]:
    """What fits, and what doesn't with the reason. Collective: makes groups."""
    world = dist.get_world_size()
    if world == 1:
        # Nothing crosses ranks, so every scheme is the same call: told apart, so that what a scheme costs then can be seen.
        names = ("none", *(name for name in options.schemes or SCHEMES if name in SCHEMES))
        return [Form(result=SequenceResult(scheme=name), shard=whole(case.grid)) for name in names], []
    forms: list[Form] = []
    refused: list[SequenceResult] = []
    links: dict[int, Links] = {}
    for name in options.schemes or (*SCHEMES, *PACKAGES):
        inner = options.sp.ulysses or _inner(world, heads=case.heads) if name == "usp" else None  # no other scheme has one
        kind = name if name in SCHEMES else "ulysses"
        sp = options.sp.model_copy(update={"scheme": kind, "degree": world, "ulysses": inner})
        problems = _problems(name, sp, case)
        if problems:
            refused.append(SequenceResult(scheme=name, problem="; ".join(problems)))
            continue
        size = sp_ulysses(sp)
        if size not in links:
            links[size] = build_mesh(device, dp_replicate=1, sp=sp, timeout_s=options.timeout_s).links[world]
        forms += _forms(name, sp, case, links[size])
    return forms, refused


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _inner(world: int, *, heads: int) -> int:
    """Of usp where nothing is asked for: both axes longer than one if that can be."""
    fits = [u for u in _divisors(world)[1:-1] if heads % u == 0]
    return fits[0] if fits else world


def _problems(name: str, sp: SpConfig, case: SequenceCase) -> list[str]:
    joint = case.model == "dit"
    if name in SCHEMES:
        return scheme_problems(sp, case.grid, heads=case.heads, joint=joint)
    missing = package_missing(name)
    general = scheme_problems(sp.model_copy(update={"scheme": "auto"}), case.grid, heads=case.heads, joint=joint)
    if missing or general:
        return [missing] if missing else general
    return _package(name).problems(case.grid, size=sp.degree, heads=case.heads, joint=joint)


def _package(name: str) -> Scheme:
    assert dist.group.WORLD is not None
    return PACKAGES[name](dist.group.WORLD)


def _forms(name: str, sp: SpConfig, case: SequenceCase, links: Links) -> Iterable[Form]:
    if name not in SCHEMES:
        yield Form(result=SequenceResult(scheme=name), shard=_shard(case, _package(name), links))
        return
    made = {overlap: SCHEMES[name](sp.model_copy(update={"overlap": overlap})) for overlap in (True, False)}
    one = vars(made[True]) == vars(made[False])  # such as allgather, which blocks by definition
    for overlap in (False,) if one else (True, False):
        yield Form(
            result=SequenceResult(scheme=name, overlap=None if one else overlap),
            shard=_shard(case, made[overlap], links),
            silent=_shard(case, made[overlap], silent(links)),
        )


def _shard(case: SequenceCase, scheme: Scheme, links: Links) -> Shard:
    by_rows, sizes = cut(case.grid, size=links.sp.size)
    return Shard(grid=case.grid, by_rows=by_rows, sizes=sizes, scheme=scheme, local=Local(), links=links)


def _examined(form: Form, subject: Subject, *, wanted: _Run) -> Form:
    """With its difference from one process (``wanted``), its bytes and its memory. Collective."""
    case, grid, region = subject.case, subject.case.grid, form.shard.region
    x, dy = subject.tokens("x", region), subject.tokens("dy", region)
    found = _run(subject, form.shard, x, dy)
    places = slice(region.h0 * grid.w, region.h1 * grid.w)
    pairs = [(a, b, b[:, region.t0 : region.t1, places]) for a, b in zip(found.tokens, wanted.tokens)]
    for grad, whole_grad in zip(found.weights, wanted.weights):
        dist.all_reduce(grad)  # of the tokens of all ranks, as data parallelism sums it
        pairs.append((grad, whole_grad, whole_grad))
    differences = [((a - b).abs().max() / of.abs().max()).double() for a, of, b in pairs]
    difference = _largest(torch.stack(differences).max(), device=subject.device)
    if not difference <= TOLERANCES[case.dtype]:  # NaN is no number that is small enough
        raise OpensoraError(
            f"{form.result.name}: output or gradients differ from one process by {difference:.2g} of the largest value, more "
            f"than {TOLERANCES[case.dtype]:g}; its speed means nothing, so nothing was timed"
        )
    with SentBytes() as there:
        out = subject.forward(x, form.shard)
    with SentBytes() as back:
        torch.autograd.backward(out, dy)
    subject.forget(x)
    with peak_memory(subject.device) as peak:
        torch.autograd.backward(subject.forward(x, form.shard), dy)
    subject.forget(x)
    return replace(
        form,
        result=replace(
            form.result,
            difference=difference,
            sent=Traffic(forward=there.total, backward=back.total),
            formula=_formula(form, case),
            memory_bytes=int(_largest(torch.tensor(float(peak.bytes)), device=subject.device)),
        ),
    )


def _formula(form: Form, case: SequenceCase) -> Traffic:
    sent = case.bytes_by_formula(form.shard)
    if case.recompute != "none" and form.result.scheme in PACKAGES:
        # A package knows of no tape: the forward that backward runs again communicates again.
        return Traffic(forward=sent.forward, backward=sent.forward + sent.backward)
    return sent


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Of one forward and backward: output and input gradient of the tokens here, and what they give to the gradients of weights."""

    tokens: tuple[Tensor, Tensor]
    weights: tuple[Tensor, ...]


def _run(subject: Subject, shard: Shard, x: Tensor, dy: Tensor) -> _Run:
    x.requires_grad_()
    out = subject.forward(x, shard)
    torch.autograd.backward(out, dy)
    assert x.grad is not None
    weights = tuple(
        (torch.zeros_like(w) if w.grad is None else w.grad).double()
        for name, w in subject.block.named_parameters()
        if name.endswith(_COMPARED)
    )
    run = _Run(tokens=(out.detach(), x.grad), weights=weights)
    subject.forget(x)
    return run


def _largest(value: Tensor, *, device: torch.device) -> float:
    value = value.to(device, torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _rounds(
    forms: Sequence[Form], subject: Subject, *, options: Options, on_round: Callable[[int], None] | None
) -> list[tuple[list[Pass], list[Pass]]]:
    """Passes of each form and of its silent twin."""
    region = forms[0].shard.region if forms else Region.whole(subject.case.grid)
    x, dy = subject.tokens("x", region).requires_grad_(), subject.tokens("dy", region)
    shards = [s for form in forms for s in (form.shard, form.silent) if s is not None]
    turns = [partial(timed_pass, subject, shard, x, dy) for shard in shards]
    table = take_turns(turns, rounds=options.rounds, warmup=options.warmup, on_round=on_round)
    passes = iter(_over_ranks(table, device=subject.device))
    return [(next(passes), next(passes) if form.silent is not None else []) for form in forms]


def _over_ranks(table: list[list[list[float]]], *, device: torch.device) -> list[list[Pass]]:
    """[round][form][4] of each rank to a list of passes per form: the slowest rank's seconds, the mean of the waits. Collective."""
    if not table or not table[0]:
        return []
    most, mean = of_all_ranks(table, device=device)
    both = torch.cat([most[..., :2], mean[..., 2:]], dim=-1).tolist()
    return [[Pass(forward_s=f, backward_s=b, forward_wait_s=wf, backward_wait_s=wb) for f, b, wf, wb in its] for its in both]
