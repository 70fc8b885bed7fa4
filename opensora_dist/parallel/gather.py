"""Texts of all ranks, beside the training traffic."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_text(text: str, *, group: dist.ProcessGroup | None) -> list[str]:
    """Every rank's text, by rank. As bytes in tensors: ``all_gather_object`` would pickle. Collective over ``group``.

    Args:
        group: Its backend must take CPU tensors (gloo). None is all ranks, or this process alone where there is no process group.
    """
    if not dist.is_initialized():
        return [text]
    world = dist.get_world_size(group)
    data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)  # frombuffer refuses an empty buffer
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    width = max(int(n) for n in lengths)
    rows = [torch.zeros(width, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(rows, torch.nn.functional.pad(data, (0, width - len(data))), group=group)
    return [row[: int(n) - 1].numpy().tobytes().decode() for row, n in zip(rows, lengths)]
