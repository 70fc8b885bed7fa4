"""What a crossing attention copies around its transfers: nothing between a projection and a message but what the documents say."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.layers import SelfAttention
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.recompute import recompute
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.recipes.bench.scale import simulated

DOCS = Path(__file__).parents[2] / "docs" / "sequence.md"
HEADS, WIDTH, FRAMES, PLACES = 8, 24, 3, 16 * 8  # frames of a rank; its tokens are many beside the width, so weights are small
COPIES = {getattr(torch.ops.aten, name) for name in ("copy_", "clone", "_to_copy", "cat", "stack", "contiguous")}
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}
FORMS = {
    "ulysses": SpConfig(scheme="ulysses", chunks=1),
    "ulysses, blocking": SpConfig(scheme="ulysses", overlap=False),
    "usp, one group": SpConfig(scheme="usp"),
    "fastseq": SpConfig(scheme="fastseq", chunks=1),
    "allgather": SpConfig(scheme="allgather"),
}


@dataclass
class Log(TorchDispatchMode):
    """Events in their order: "send" and "wait" of all-to-alls, "product", and of each large copy its numbers."""

    least: int
    events: list[str | int] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.events.append("product")
        elif func.overloadpacket in COPIES and out.numel() >= self.least:
            self.events.append(out.numel())
        return out

    def watch(self, stack):
        """Notes all-to-alls; attention is one that keeps the layout of what it is given, as CUDA's flash kernel does."""
        start, wait, sent = Exchange.all_to_all, Pending.wait, set()

        def noted_start(exchange, *args, **kwargs):
            self.events.append("send")
            pending = start(exchange, *args, **kwargs)
            sent.add(pending)
            return pending

        def noted_wait(pending):
            if pending in sent:
                sent.remove(pending)
                self.events.append("wait")
            return wait(pending)

        stack.enter_context(mock.patch.object(Exchange, "all_to_all", noted_start))
        stack.enter_context(mock.patch.object(Pending, "wait", noted_wait))
        for scheme in ("ulysses", "fastseq", "allgather"):
            stack.enter_context(mock.patch(f"opensora_dist.parallel.sequence.{scheme}.attention", KeepsLayout.apply))
        stack.enter_context(self)


class KeepsLayout(torch.autograd.Function):
    """Neither numbers nor gradients matter here, only how they lie."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        with _disable_current_modes():
            return torch.zeros_like(q)

    @staticmethod
    def backward(ctx, _grad):
        with _disable_current_modes():
            return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def logged(sp, size, *, batch=1, replay=False):
    """Events of forward, and of backward, of one attention over time, with copies in units of a number per token and width."""
    unit = batch * FRAMES * PLACES * WIDTH
    sp = sp.model_copy(update={"degree": size, "ulysses": size if sp.scheme == "usp" else None})
    with simulated(size), ExitStack() as stack:
        mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=60)
        shard = SequenceParallel(mesh, sp).shard(Thw(FRAMES * size, 16, 8))
        attn = SelfAttention(WIDTH, heads=HEADS).double()
        x = torch.zeros(batch, FRAMES, PLACES, WIDTH, dtype=torch.float64, requires_grad=True)
        grad = torch.zeros(x.shape, dtype=x.dtype)
        log = Log(least=unit // size)
        log.watch(stack)
        if replay:
            out = recompute(lambda x, tape: shard.scheme.attend(attn, x, Axis.TIME, shard.taped(tape)), x)
        else:
            out = shard.scheme.attend(attn, x, Axis.TIME, shard)
        forward = list(log.events)
        log.events.clear()
        torch.autograd.grad(out, [x, *attn.parameters()], grad)  # a leaf would copy a gradient that is not in its layout
        backward = list(log.events)
    return [[e / unit if isinstance(e, int) else e for e in events] for events in (forward, backward)]


def copied(events):
    return sum(event for event in events if not isinstance(event, str))


def last(events, what):
    return len(events) - 1 - events[::-1].index(what)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("form", ["ulysses", "ulysses, blocking", "usp, one group"])
def test_projections_write_messages_and_nothing_is_copied_before_one_is_sent(form, size):
    messages = {"ulysses": 3, "ulysses, blocking": 1, "usp, one group": 2}[form]
    for batch in (1, 2):
        forward, backward = logged(FORMS[form], size, batch=batch)
        assert forward.count("send") == backward.count("send") == messages + 1
        to_heads = [i for i, event in enumerate(forward) if event == "send"][messages - 1]
        # Of several samples x is put in the order of positions, once; so is the gradient.
        assert copied(forward[:to_heads]) == batch - 1
        assert copied(backward[: backward.index("send")]) == batch - 1


@pytest.mark.parametrize("form", ["ulysses", "ulysses, blocking", "usp, one group", "fastseq"])
def test_what_came_is_read_where_it_lies_by_as_many_products_as_move_no_more_than_a_copy(form):
    for size, home in ((2, 0), (4, 1), (8, 1)):
        forward, _ = logged(FORMS[form], size)
        after = forward[last(forward, "wait") :]
        assert copied(after) == home and after.count("product") == (1 if home else size)
    sent_apart, sent_together = (
        [copied(events[last(events, "wait") :]) for _, events in (logged(FORMS[name], size) for size in (2, 4, 8))]
        for name in ("ulysses", "ulysses, blocking")
    )
    assert sent_apart == [0, 1, 1] and sent_together == [0, 0, 3]  # apart: of queries, which come last


def test_in_a_second_run_nothing_is_projected_for_messages_that_are_not_sent():
    for form, messages in (("ulysses", 3), ("ulysses, blocking", 1), ("usp, one group", 2)):
        _, plain = logged(FORMS[form], 2)
        _, again = logged(FORMS[form], 2, replay=True)
        assert again.count("product") - plain.count("product") == 2, "of the output projection, one for each rank"
        assert again.count("send") == plain.count("send") == messages + 1


def test_the_documents_say_what_is_copied():
    for name, sp in FORMS.items():
        cells = []
        for batch in (1, 2):
            for size in (2, 4, 8):
                forward, backward = logged(sp, size, batch=batch)
                cells.append(f"{copied(forward):g} + {copied(backward):g}")
        assert f"| {name} | {' | '.join(cells)} |" in DOCS.read_text()
