"""Compiles every kernel ahead of time, without a GPU: does it build for each architecture, and what does it need there?

    python -m opensora_kernels.compile --arch 80 90 100 [--page docs/kernels.md]

A kernel that spills registers is not refused, but shown: what a thread can't hold goes through memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opensora_kernels import add_norm_modulate, bias_gelu, gated, norm_modulate, short_attention, varlen_attention
from opensora_kernels.products import head_parts
from opensora_kernels.rows import ROWS_BACKWARD, ROWS_FORWARD, block_of, warps_of

ARCHITECTURES = {80: "A100", 90: "H100, H800, H200", 100: "B200"}
_BEGIN, _END = "<!-- table of kernels: made by opensora_kernels.compile -->", "<!-- end of the table of kernels -->"
_WIDTH, _HEAD_DIM = 1152, 72  # of XL/2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with types and sizes, as training at XL/2 in bfloat16 calls it: a residual stream and a modulation in float32."""

    name: str
    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, int]
    warps: int


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a compiled kernel takes of a multiprocessor.

    Args:
        registers: Of a thread.
        spilled_bytes: Of a thread, that go through memory.
        shared_bytes: Of a program.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def cases() -> Iterator[Case]:
    """All kernels."""
    yield from _of_rows()
    yield from _of_attention()


def _of_attention() -> Iterator[Case]:
    """In several sizes."""
    sizes = {"N": _WIDTH // _HEAD_DIM, "K": _HEAD_DIM, **dict(zip(("LO", "HI"), head_parts(_HEAD_DIM)))}
    for frames in (16, 32, 64):
        tile = {**sizes, "ROWS": short_attention._tile(frames, _HEAD_DIM)[0]}
        for way in ("forward", "backward"):
            kernel = getattr(short_attention, f"_short_attention_{way}")
            yield _case(f"short_attention, {frames} frames, {way}", kernel, tile, short_attention._warps(frames))
    rows, columns = varlen_attention._ROWS, varlen_attention._COLUMNS
    for way, walked in (("forward", columns), ("backward_q", varlen_attention._COLUMNS_OF_Q), ("backward_k", columns)):
        tile = {**sizes, "ROWS": rows, "COLUMNS": walked}
        kernel, sums = getattr(varlen_attention, f"_varlen_attention_{way}"), ("lse", "weight", "dkv")
        yield _case(f"varlen_attention, {way}", kernel, tile, varlen_attention._warps(rows), float32=sums)


def _of_rows() -> Iterator[Case]:
    """Those that work on each token by itself."""
    modulation = ("gate", "shift", "scale", "bias", "sums")
    stream = (*modulation, "x", "dx", "stream", "dstream")
    forward, backward = ({"BLOCK": block_of(_WIDTH), "ROWS": rows} for rows in (ROWS_FORWARD, ROWS_BACKWARD))
    warps = warps_of(_WIDTH)
    yield _case("norm_modulate, forward", norm_modulate._norm_modulate_forward, forward, warps, float32=stream)
    yield _case("norm_modulate, backward", norm_modulate._norm_modulate_backward, backward, warps, float32=stream)
    yield _case("add_norm_modulate, forward", add_norm_modulate._add_norm_modulate_forward, forward, warps, float32=stream)
    yield _case("add_norm_modulate, backward", add_norm_modulate._add_norm_modulate_backward, backward, warps, float32=stream)
    tile = {"COLUMNS": gated.COLUMNS, "ROWS": gated.ROWS}
    yield _case("gated, forward", gated._gated_forward, tile, gated.WARPS, float32=(*stream, "out"))
    yield _case("gated, backward", gated._gated_backward, tile, gated.WARPS, float32=(*stream, "grad"))
    tile = {"COLUMNS": bias_gelu.COLUMNS, "ROWS": bias_gelu.ROWS}
    yield _case("bias_gelu, forward", bias_gelu._bias_gelu_forward, tile, bias_gelu.WARPS, float32=modulation)
    yield _case("bias_gelu, backward", bias_gelu._bias_gelu_backward, tile, bias_gelu.WARPS, float32=modulation)


_WHOLE = {"L", "D", "R", "H", "S", "T", "N", "K", "Q", "M", "rows", "tiles"}
_MULTIPLES = {"L", "D", "H", "S", "N"}
"""Multiples of 16 in XL/2 at the published shapes."""
_INTEGERS = {"q_ends", "k_ends", "k_stops"}


def _case(name: str, kernel: Any, constants: Mapping[str, int], warps: int, *, float32: tuple[str, ...] = ()) -> Case:
    types: dict[str, str | tuple[str, ...]] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_steps"):
            types[argument] = ("i32", "i32", "i32")
        elif argument in _WHOLE or argument.endswith("_step"):
            types[argument] = "i32"
        elif argument == "eps" or (argument == "scale" and "attention" in name):
            types[argument] = "fp32"
        elif argument == "mask":
            types[argument] = "*i1"
        else:
            types[argument] = "*i32" if argument in _INTEGERS else "*fp32" if argument in float32 else "*bf16"
    return Case(name=name, kernel=kernel, types=types, constants=constants, warps=warps)


def _aligned(case: Case) -> Iterator[tuple[int, ...]]:
    """Places of arguments, or within them, that hold addresses and multiples of 16."""
    unknown = {case.kernel.params[n].name for n in range(len(case.types)) if case.kernel.params[n].do_not_specialize}
    for n, (name, type_) in enumerate(case.types.items()):
        if isinstance(type_, tuple):
            yield from ((n, i) for i in range(len(type_)))
        elif type_.startswith("*") or (
            (name in _MULTIPLES or name.endswith("_step")) and name not in unknown | set(case.constants)
        ):
            yield (n,)


def compiled(case: Case, architecture: int) -> Needs:
    """Builds a kernel for ``sm_<architecture>``, down to machine code."""
    hints = {at: [["tt.divisibility", 16]] for at in _aligned(case)}  # what the compiler is told at run time, too
    source = ASTSource(case.kernel, signature=dict(case.types), constexprs=dict(case.constants), attrs=hints)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Needs(registers=found["REG"], spilled_bytes=found["STACK"] + found["LOCAL"], shared_bytes=int(kernel.metadata.shared))


def table(architectures: list[int]) -> str:
    """Markdown: a row per kernel, what it needs on each architecture."""
    heads = [f"sm_{a} ({ARCHITECTURES.get(a, '?')})" for a in architectures]
    lines = ["| kernel, warps | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    for case in cases():
        needs = [compiled(case, a) for a in architectures]
        cells = [f"{n.registers}, {n.spilled_bytes}, {n.shared_bytes / 1024:.1f}" for n in needs]
        lines.append(f"| {case.name}, {case.warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    args = parser.parse_args()
    made = table(args.arch)
    print(made)
    if args.page is not None:
        text = args.page.read_text()
        before, after = text[: text.index(_BEGIN)], text[text.index(_END) :]
        args.page.write_text(f"{before}{_BEGIN}\n\n{made}\n\n{after}")


if __name__ == "__main__":
    main()
