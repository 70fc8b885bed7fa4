"""The schemes a config can name. A new one: one file beside this, one line here; the parity matrix picks it up by name."""

from __future__ import annotations

from collections.abc import Callable

from opensora_dist.config.train import SpConfig
from opensora_dist.parallel.sequence.allgather import AllGather
from opensora_dist.parallel.sequence.base import Scheme
from opensora_dist.parallel.sequence.dsp import Dsp
from opensora_dist.parallel.sequence.fastseq import FastSeq
from opensora_dist.parallel.sequence.ring import Ring
from opensora_dist.parallel.sequence.ulysses import Ulysses
from opensora_dist.parallel.sequence.usp import Usp

SCHEMES: dict[str, Callable[[SpConfig], Scheme]] = {
    "dsp": lambda sp: Dsp(overlap=sp.overlap, chunks=sp.chunks),
    "fastseq": lambda sp: FastSeq(overlap=sp.overlap, chunks=sp.chunks, keep_gathered=sp.fastseq_dw == "keep"),
    "ulysses": lambda sp: Ulysses(overlap=sp.overlap, chunks=sp.chunks),
    "ring": lambda sp: Ring(overlap=sp.overlap),
    "usp": lambda sp: Usp(ulysses=sp.ulysses or sp.degree, degree=sp.degree, overlap=sp.overlap),
    "allgather": lambda _sp: AllGather(),
}
