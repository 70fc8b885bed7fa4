"""The one transformer block that a sequence benchmark times, and what goes into it."""

# B batch, T frames, S tokens per frame, D width, Y text tokens; t, s: of this rank

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opensora_dist.config.train import ModelConfig, ModelName
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.layers import Block
from opensora_dist.models.registry import build_model
from opensora_dist.ops.samples import captions
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.recompute import Recompute
from opensora_dist.parallel.sequence.base import Shard, Traffic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEFAULT_GRID = Thw(16, 16, 16)


@dataclass(frozen=True, kw_only=True)
class SequenceCase:
    """One block's work, on samples that all ranks share.

    Args:
        grid: Tokens of a sample.
        dtype: Of the computation; bfloat16 runs under autocast with a float32 residual stream, as training does.
        recompute: What backward runs again, without communicating again.
    """

    model: ModelName = "stdit"
    batch: int = 1
    grid: Thw = DEFAULT_GRID
    width: int = 384
    heads: int = 8
    text_tokens: int = 120
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        problems = [
            f"--{name} must be 1 or more, and is {value}"
            for name, value in (("batch", self.batch), ("frames", self.grid.t), ("places", min(self.grid[1:])))
            if value < 1
        ]
        if self.width % max(1, self.heads) or self.width % 4 or self.heads < 1:
            problems.append(f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}")
        if problems:
            raise ConfigError(problems)

    @property
    def element_bytes(self) -> int:
        """Of what travels."""
        return DTYPES[self.dtype].itemsize

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Of the block's attentions."""
        return (Axis.JOINT,) if self.model == "dit" else (Axis.SPACE, Axis.TIME)

    def bytes_by_formula(self, shard: Shard) -> Traffic:
        """What a rank should send in the block, by the scheme's own formula."""
        sent = [
            shard.scheme.bytes_sent(shard, axis, batch=self.batch, width=self.width, element_bytes=self.element_bytes)
            for axis in self.axes
            if shard.crosses(axis)
        ]
        return Traffic(forward=sum(s.forward for s in sent), backward=sum(s.backward for s in sent))

    @property
    def flops(self) -> int:
        """Forward FLOPs of the block on one sample, by the model's own formula."""
        return build_block(self).flops(self.grid, text_tokens=self.text_tokens)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "grid": list(self.grid)}


def meta_model(case: SequenceCase) -> VideoTransformer:
    """A model of that one block, on the meta device."""
    io = ModelIo(in_channels=4, out_channels=4, text_width=8, max_tokens=max(1, case.text_tokens))
    with torch.device("meta"):
        return build_model(ModelConfig(name=case.model, depth=1, width=case.width, heads=case.heads), io)


def build_block(case: SequenceCase) -> Block:
    """The block, on the meta device."""
    block = meta_model(case).blocks[0]
    assert isinstance(block, Block)
    return block


class Subject:
    """The block with random weights, the same on every rank, and its inputs for one part of the samples."""

    def __init__(self, case: SequenceCase, *, device: torch.device) -> None:
        self.case, self.device = case, device
        self._keys = Keys(0)
        self.block = build_block(case).to_empty(device=device).to(DTYPES[case.dtype])
        self.block.recompute = case.recompute
        with torch.no_grad():
            for name, parameter in self.block.named_parameters():
                # As wide as keeps activations of the size of the input; no gate is zero, so that a wrong gradient would show.
                std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=self._keys.generator(name)))
        self._residual = torch.float64 if case.dtype == "float64" else torch.float32
        self._t_B6D = self._draw("t", case.batch, 6, case.width)
        self._text_BYD = self._draw("text", case.batch, case.text_tokens, case.width)

    def _draw(self, what: str, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=self._keys.generator(what)).to(self.device, self._residual)

    def tokens(self, what: str, region: Region) -> Tensor:
        """Random numbers [B, t, s, D] of a region; a token's are the same whichever region it is in."""
        grid = self.case.grid
        whole = self._draw(what, self.case.batch, grid.t, grid.h * grid.w, self.case.width)
        return whole[:, region.t0 : region.t1, region.h0 * grid.w : region.h1 * grid.w].contiguous()

    def forward(self, x_BtsD: Tensor, shard: Shard) -> Tensor:
        """The block's output."""
        of_text = captions(None, samples=self.case.batch, keys=self.case.text_tokens, device=self.device)
        with self.autocast():
            out: Tensor = self.block(x_BtsD, shard=shard, t_B6D=self._t_B6D, text_BYD=self._text_BYD, captions=of_text)
        return out

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As training computes."""
        if self.case.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forget(self, x_BtsD: Tensor) -> None:
        """Drops gradients."""
        x_BtsD.grad = None
        for parameter in self.block.parameters():
            parameter.grad = None
