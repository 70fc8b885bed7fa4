"""The smallest kernel there is, to see whether Triton runs and compiles here. Imported where Triton is installed alone."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, attr-defined, unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_BLOCK = 64


def _add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < n
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=here) + tl.load(y_ptr + place, mask=here), mask=here)


def runs(device: torch.device) -> bool:
    """Adds two vectors; on a CPU that takes TRITON_INTERPRET=1, set before Triton is imported. Whether the sum is right."""
    x = torch.arange(100, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    triton.jit(_add)[(triton.cdiv(len(x), _BLOCK),)](x, x, out, len(x), BLOCK=_BLOCK)
    return bool(torch.equal(out, 2 * x))


def compiles(capability: int) -> bool:
    """Whether it becomes machine code for a GPU of this compute capability, which need not be here."""
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=JITFunction(_add), signature=signature, constexprs={"BLOCK": _BLOCK})
    return bool(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])
