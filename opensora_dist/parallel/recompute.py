"""Activation recomputation that never communicates twice: what came from other ranks is kept, the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Tape:
    """What a region received in its first run, handed out again, in order, in every later run of it.

    It holds and hands out aliases without history: a node of autograd that knows the tape and returns a tensor becomes that tensor's
    ``grad_fn``, and a tape that held the tensor would then hold itself, through C++, where no garbage collector sees it.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next: int | None = None

    @property
    def replaying(self) -> bool:
        """Whether this is a later run: nothing may be sent then."""
        return self._next is not None

    def keep(self, received: Tensor) -> Tensor:
        """Notes a result of communication in the first run; not called in a later one."""
        assert not self.replaying
        self._kept.append(received.detach())
        return received

    def replay(self) -> Tensor:
        """The next result of the first run."""
        assert self._next is not None
        self._next += 1
        return self._kept[self._next - 1].detach()

    def rewind(self) -> None:
        """Later runs start here."""
        self._next = 0


def recompute(region: Callable[[Tensor, Tape | None], Tensor], x: Tensor) -> Tensor:
    """``region(x, tape)``, storing only ``x`` and what the tape keeps; backward runs the region again.

    Args:
        region: A pure function whose every communication goes through the tape it is given. It may close over parameters. Where no
            gradient is asked for it runs once, and has no tape.
    """
    if not torch.is_grad_enabled():
        return region(x, None)
    tape = Tape()

    def run(x: Tensor) -> Tensor:
        try:
            return region(x, tape)
        finally:
            tape.rewind()  # also where checkpoint breaks a run off once it has what backward needs

    # No draw is made in a block, so there is no generator state to carry.
    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return out
