"""A rank that is gone or stuck, said in words: backends raise what their sockets say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from opensora_dist.core.errors import CommunicationError

# What gloo puts into a plain RuntimeError (gloo/transport/tcp: pair.cc, unbound_buffer.cc; gloo/rendezvous), and torch's own waits.
_GLOO_PHRASES = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket closed",
    "timed out",
    "application timeout caused pair closure",
    "connectfullmesh failed",
)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that another rank can't be reached or didn't answer in time."""
    if isinstance(error, CommunicationError | dist.DistError):  # the latter of NCCL, of the store, of the network
        return True
    return type(error) is RuntimeError and any(phrase in str(error).lower() for phrase in _GLOO_PHRASES)


@contextmanager
def lost_contact_said(*, timeout_s: float, option: str | None = "parallel.timeout_s") -> Iterator[None]:
    """Around what calls collectives: a lost rank becomes a ``CommunicationError``; every other error passes.

    Args:
        timeout_s: Of the groups.
        option: What sets it; None: nothing does.
    """
    limit = f"{timeout_s:g} s" if option is None else f"{option}={timeout_s:g}"
    slow = "" if option is None else f"; raise {option} where a rank was only slow"
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise CommunicationError(
            f"rank {os.environ.get('RANK', '0')} lost contact with another rank, which ended, or took longer than {limit}; "
            "the first error in the ranks' logs says why. Start the same command again, which goes on from the last checkpoint where "
            f"there is one{slow} ({' '.join(str(error).split())})"
        ) from error
