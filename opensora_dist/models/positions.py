"""Sin-cos positions, computed for the grid at hand: any frames, height and width, with nothing stored in the weights."""

# T frames, H W tokens down and across, S = H * W, D width

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(length: int, *, width: int, scale: float, device: torch.device | None = None) -> Tensor:
    """``[sin, cos]`` of position / scale at ``width / 2`` frequencies from 1 down to (almost) 1/10000.

    Returns:
        float64 [length, width]: the angles of long grids need the digits, whatever precision the model has.
    Source: the sin-cos table of "Attention Is All You Need", arXiv 1706.03762, laid out as in MAE and DiT.
    """
    half = width // 2
    omega = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device) / scale, omega)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(height: int, width_tokens: int, *, width: int, scale: float, device: torch.device | None = None) -> Tensor:
    """The first half of the channels encodes the column, the second half the row: ``[sin w, cos w | sin h, cos h]``.

    Returns:
        float64 [height * width_tokens, width], row by row.
    """
    rows = sincos_1d(height, width=width // 2, scale=scale, device=device)[:, None].expand(-1, width_tokens, -1)
    columns = sincos_1d(width_tokens, width=width // 2, scale=scale, device=device).expand(height, -1, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class Positions:
    """The position tables of one model, made once per grid, device and dtype.

    Args:
        width: Channels of a token, a multiple of 4.
        space_scale: Rows and columns count in steps of 1 / space_scale.
        time_scale: Frames count in steps of 1 / time_scale.
    """

    def __init__(self, *, width: int, space_scale: float, time_scale: float) -> None:
        self.width = width
        self.space_scale = space_scale
        self.time_scale = time_scale
        self._tables: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def space(self, height: int, width_tokens: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[S, D] of a frame of tokens."""
        key = ((height, width_tokens), device, dtype)
        if key not in self._tables:
            table = sincos_2d(height, width_tokens, width=self.width, scale=self.space_scale, device=device)
            self._tables[key] = table.to(dtype)
        return self._tables[key]

    def time(self, frames: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[T, D] of a run of token frames."""
        key = ((frames,), device, dtype)
        if key not in self._tables:
            self._tables[key] = sincos_1d(frames, width=self.width, scale=self.time_scale, device=device).to(dtype)
        return self._tables[key]
