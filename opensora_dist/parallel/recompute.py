"""Activation recomputation that never communicates twice: what came from other ranks is kept, the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")
Recompute = Literal["none", "selective", "full"]
"""What is computed again in backward (``parallel.recompute``)."""

# Operators whose outputs are kept, each with what its backward needs: output, log-sum-exp, seeds. By name, since the packages that
# register the last of them are imported where they are used. Those that autograd calls for `scaled_dot_product_attention`:
_ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{kernel}"
    for kernel in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)
# And those that are called below autograd, or inside autograd functions, of which none is a scheme's: gradients are off there.
_ATTENTION_BELOW = frozenset(
    (
        "opensora::short_attention",
        "opensora::varlen_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
    )
)


class Store(Protocol):
    """Where what is kept waits for backward."""

    def pack(self, tensor: Tensor) -> Any:
        """Puts a tensor away; gives what ``unpack`` finds it by."""
        ...

    def unpack(self, packed: Any) -> Any:
        """The tensor, on its device; may be asked for again. What was never packed is given back."""
        ...


class Tape:
    """What a region keeps of its first run, handed out again, in order, in every later run of it.

    It holds and hands out aliases without history: a node of autograd that knows the tape and returns a tensor becomes that tensor's
    ``grad_fn``, and a tape that held the tensor would then hold itself, through C++, where no garbage collector sees it.

    Args:
        store: Where it waits; None: where it is.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._kept: list[Any] = []
        self._next: int | None = None
        self._store = store

    @property
    def replaying(self) -> bool:
        """Whether this is a later run: nothing may be sent then."""
        return self._next is not None

    def keep(self, received: T) -> T:
        """Notes a tensor (or a number) in the first run; not called in a later one. It may still be arriving, until the run ends."""
        assert not self.replaying
        self._kept.append(received.detach() if isinstance(received, Tensor) else received)
        return received

    def replay(self) -> Any:
        """The next thing of the first run."""
        assert self._next is not None
        self._next += 1
        kept = self._kept[self._next - 1]
        if self._store is not None:
            kept = self._store.unpack(kept)
        return kept.detach() if isinstance(kept, Tensor) else kept

    def rewind(self) -> None:
        """Later runs start here."""
        if self._store is not None and not self.replaying:
            self._kept = [self._store.pack(kept) if isinstance(kept, Tensor) else kept for kept in self._kept]
        self._next = 0


class _KeepAttention(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's, which has no types
    """Puts on a tape what the attentions within give.

    Inside an autograd function of a scheme gradients are off, and that function keeps its own result.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions that communicate nothing attend to nothing; without this they would not be compiled within."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        if name not in _ATTENTION_BELOW and not (name in _ATTENTION and torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))
        if self._tape.replaying:
            outs = tuple(self._tape.replay() for _ in func._schema.returns)
            return outs[0] if len(outs) == 1 else outs
        outs = func(*args, **(kwargs or {}))
        for part in outs if isinstance(outs, tuple) else (outs,):
            self._tape.keep(part)
        return outs


def recompute(
    region: Callable[[Tensor, Tape | None], Tensor],
    x: Tensor,
    *,
    how: Literal["selective", "full"] = "full",
    store: Store | None = None,
) -> Tensor:
    """``region(x, tape)``, storing only ``x`` and what the tape keeps; backward runs the region again.

    Args:
        region: A pure function whose every communication goes through the tape it is given. It may close over parameters. Where no
            gradient is asked for it runs once, and has no tape.
        how: selective also keeps what attentions give, so that backward attends to nothing again.
        store: Where what the tape keeps waits.
    """
    if not torch.is_grad_enabled():
        return region(x, None)
    tape = Tape(store)

    def run(x: Tensor) -> Tensor:
        try:
            with _KeepAttention(tape) if how == "selective" else nullcontext():
                return region(x, tape)
        finally:
            tape.rewind()  # also where checkpoint breaks a run off once it has what backward needs

    # No draw is made in a block, so there is no generator state to carry.
    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return out


def recompute_traced(region: Callable[[Tensor], Tensor], x: Tensor, *, how: Literal["selective", "full"]) -> Tensor:
    """``recompute`` inside of what torch.compile traces, where nothing is sent, so that there is nothing for a tape to keep."""
    if not torch.is_grad_enabled():
        return region(x)
    options: dict[str, Any] = {}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    out: Tensor = checkpoint(region, x, use_reentrant=False, preserve_rng_state=False, **options)
    return out


def _keep_attention(_ctx: Any, func: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in _ATTENTION | _ATTENTION_BELOW else CheckpointPolicy.PREFER_RECOMPUTE


def tiled(region: Callable[..., Tensor], *xs: Tensor, dim: int, size: int) -> Tensor:
    """``region(*xs)`` of a region that works on each place of ``dim`` by itself, ``size`` places at a time.

    Backward runs each tile again, so that no more than one tile's inner tensors are ever there. May stand inside ``recompute``, and then
    runs three times. Gradients of parameters are added up before anyone sees them, as checkpoint's form without reentry does.

    Args:
        region: A pure function; nothing in it communicates.
        xs: Alike in ``dim``, along which the output is as long.
        dim: Along which tiles are cut.
        size: Places of a tile; the last may have fewer.
    """
    tiles = zip(*(torch.split(x, size, dim=dim) for x in xs))
    return torch.cat([checkpoint(region, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles], dim=dim)
