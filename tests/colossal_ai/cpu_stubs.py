"""What Colossal-AI asks of a GPU, answered on a CPU: these stubs are for tests alone. Everything else of it runs as it is."""

from __future__ import annotations

from contextlib import nullcontext

import torch


class _Stream:
    """A CPU does one thing after another: nothing to wait for."""

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def stub_cuda() -> None:
    """Makes the CPU pass for a CUDA device, in this process, once for all."""
    from colossalai.accelerator import get_accelerator
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    accelerator = get_accelerator()
    if accelerator.name == "cuda":
        return
    accelerator._name = "cuda"  # its current device stays the CPU
    accelerator.Stream = accelerator.current_stream = lambda *args, **kwargs: _Stream()
    accelerator.stream = lambda stream: nullcontext()
    accelerator.synchronize = lambda *args, **kwargs: None
    torch.Tensor.record_stream = lambda self, stream: None  # torch has it for CUDA tensors only
    # Nothing can be pinned here, nor moved, since there is one memory: Gemini runs as it does without offload.
    made = Chunk.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **{**kwargs, "pin_memory": False})
        self.shard_device = torch.device("cuda")  # asked for its type alone

    Chunk.__init__ = make
    ChunkManager.move_chunk = lambda self, chunk, device, *args, **kwargs: None
