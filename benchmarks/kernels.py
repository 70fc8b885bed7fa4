"""Does each kernel beat what torch.compile makes of its reference, and how near its limit is it?

    python benchmarks/kernels.py --out benchmarks/results --page docs/kernels.md
    python benchmarks/kernels.py --from benchmarks/results/h100/kernels.json --page docs/kernels.md    # what was measured; needs no GPU

On a GPU: every kernel of ``kernels/opensora_kernels``, forward and backward, on what a block of XL/2 gives it under bfloat16 autocast (a
residual stream and a modulation in float32) at the three published shapes, against its reference in eager torch and under torch.compile.
Forms take turns round by round; a call's time is by CUDA events, with the host far enough ahead that its launches don't count. Writes
``<out>/<gpu>/kernels.json`` and a table into the page. A kernel is kept where it is the faster one at every shape: upper quartile of its
time over torch.compile's, forward and backward together, at most 1. What is measured is written after each case. Exit code 1: a kernel
gave something else than its reference, or an error, which is its row; 2: there is no GPU.
"""

# B samples, T frames, S tokens per frame, D width, H hidden width, N heads, K head dim, Y text tokens, Q queries, M keys

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.io import read_json, write_json
from opensora_dist.plan.hardware import gpu_for_device
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.page import write_table
from opensora_dist.recipes.bench.rounds import take_turns
from opensora_dist.recipes.bench.show import DASH, about, percent, three

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
FEWEST_ROUNDS = 5
LARGEST_DIFFERENCE = 3e-2
_AHEAD_CYCLES = 50_000_000  # the GPU waits for so long, some 30 ms, while the host launches all calls of a pass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of a block's input, and the model's sizes."""

    name: str
    batch: int
    frames: int
    places: int
    width: int = 1152
    heads: int = 16
    text_tokens: int = 120

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.batch * self.frames * self.places


PUBLISHED = (
    Shape(name="16x256x256", batch=8, frames=16, places=256),
    Shape(name="16x512x512", batch=2, frames=16, places=1024),
    Shape(name="64x512x512", batch=1, frames=64, places=1024),
)
"""Videos of Open-Sora 1.0's stages, frames x height x width; 8 pixels to a latent, 2 latents to a token. Enough samples that no cache
holds them."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Numbers that a kernel moves per token, in multiples of the width: what it must read once and write once, and nothing else.

    Args:
        float32: Of the residual stream and its gradients.
        bfloat16: Of everything else. What is of a sample, and sums over its tokens, are left out: less than a hundredth.
    """

    float32: int
    bfloat16: int

    def bytes_per_token(self, width: int) -> int:
        """In memory."""
        return (4 * self.float32 + 2 * self.bfloat16) * width


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One of the package.

    Args:
        prepare: Inputs, those of the gradients first, and (ours, reference) on them. Imports Triton.
        hidden: Its rows are of the MLP's hidden layer, 4 D wide.
    """

    prepare: Callable[[Shape, torch.device], tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]]
    forward: Moved
    backward: Moved
    hidden: bool = False

    def bytes_moved(self, shape: Shape) -> tuple[int, int]:
        """Forward and backward."""
        width = shape.width * (4 if self.hidden else 1)
        return tuple(shape.tokens * moved.bytes_per_token(width) for moved in (self.forward, self.backward))


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()


def _tokens(shape: Shape, device: torch.device, *dtypes: torch.dtype) -> list[Tensor]:
    size = (shape.batch, shape.frames, shape.places, shape.width)
    return [_draw(size, dtype, device, seed=i) for i, dtype in enumerate(dtypes)]


def _rows(shape: Shape, device: torch.device, *, kinds: int) -> list[Tensor]:
    """Gate, shift, scale: rows of one tensor, as a block has them."""
    rows = _draw((shape.batch, 6, shape.width), F32, device, seed=9).detach()
    return [row.requires_grad_() for row in rows.unbind(1)[:kinds]]


def _norm_modulate(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    from opensora_kernels.norm_modulate import norm_modulate, reference

    inputs = [*_tokens(shape, device, F32), *_rows(shape, device, kinds=2)]
    return inputs, *(lambda x, shift, scale, by=by: by(x, shift, scale, BF16, EPS) for by in (norm_modulate, reference))


def _gated(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    from opensora_kernels.gated import gated, reference

    return [*_tokens(shape, device, F32, BF16), *_rows(shape, device, kinds=1)], gated, reference


def _add_norm_modulate(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    from opensora_kernels.add_norm_modulate import add_norm_modulate, reference

    inputs = [*_tokens(shape, device, F32, BF16), *_rows(shape, device, kinds=2)]
    forms = (add_norm_modulate, reference)
    return inputs, *(lambda x, add, shift, scale, by=by: by(x, add, shift, scale, BF16, EPS) for by in forms)


def _bias_gelu(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    from opensora_kernels.bias_gelu import bias_gelu, reference

    hidden = 4 * shape.width
    size = (shape.batch, shape.frames, shape.places, hidden)
    return [_draw(size, BF16, device, seed=0), _draw((hidden,), F32, device, seed=1)], bias_gelu, reference


def _short_attention(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    from opensora_kernels.short_attention import reference, short_attention

    size = (shape.batch, shape.frames, shape.places, 3, shape.heads, shape.width // shape.heads)
    return [_draw(size, BF16, device, seed=0)], short_attention, reference


def _varlen_attention(shape: Shape, device: torch.device) -> tuple[list[Tensor], Callable[..., Any], Callable[..., Any]]:
    """Cross-attention to whole captions. The reference is what there is without varlen: all samples at once, padded."""
    from opensora_kernels.varlen_attention import varlen_attention

    B, Y, N = shape.batch, shape.text_tokens, shape.heads
    K, each = shape.width // N, shape.frames * shape.places
    inputs = [_draw((shape.tokens, N, K), BF16, device, seed=0), _draw((B * Y, 2, N, K), BF16, device, seed=1)]
    q_ends, k_ends = (torch.arange(B + 1, dtype=torch.int32, device=device) * size for size in (each, Y))
    stops = k_ends[1:].contiguous()

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        out: Tensor = varlen_attention(q, kv, q_ends, k_ends, stops, None, each, Y)[0]
        return out

    def padded(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.view(B, Y, 2, N, K).permute(2, 0, 3, 1, 4).unbind(0)
        q = q.view(B, each, N, K).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * each, N, K)

    return inputs, ours, padded


KERNELS = {
    "norm_modulate": Kernel(prepare=_norm_modulate, forward=Moved(float32=1, bfloat16=1), backward=Moved(float32=2, bfloat16=1)),
    "gated": Kernel(prepare=_gated, forward=Moved(float32=2, bfloat16=1), backward=Moved(float32=1, bfloat16=2)),
    "add_norm_modulate": Kernel(
        prepare=_add_norm_modulate, forward=Moved(float32=2, bfloat16=2), backward=Moved(float32=3, bfloat16=2)
    ),
    "bias_gelu": Kernel(
        prepare=_bias_gelu, forward=Moved(float32=0, bfloat16=2), backward=Moved(float32=0, bfloat16=3), hidden=True
    ),
    "short_attention": Kernel(
        prepare=_short_attention, forward=Moved(float32=0, bfloat16=4), backward=Moved(float32=0, bfloat16=7)
    ),
    "varlen_attention": Kernel(
        prepare=_varlen_attention, forward=Moved(float32=0, bfloat16=2), backward=Moved(float32=0, bfloat16=6)
    ),
}
"""Of ``varlen_attention`` queries are read once for their own gradients and once for those of keys and values."""


def call(form: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs of a forward, and made-up gradients of them."""
    outs = form(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return outs, [_draw(tuple(out.shape), out.dtype, out.device, seed=20 + i).detach() for i, out in enumerate(outs)]


def difference(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """Of outputs and gradients, each over its largest value; the largest."""
    found, right = [], []
    for form, kept in ((ours, found), (theirs, right)):
        outs, grads = call(form, inputs)
        kept += [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, grads)]
    apart = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, right, strict=True)]
    return float(torch.stack(apart).max())  # NaN, where there is any


def timed_s(work: Callable[[], object], *, calls: int) -> float:
    """Seconds of a call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_AHEAD_CYCLES)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(name: str, shape: Shape, *, device: torch.device, rounds: int, calls: int) -> dict[str, Any]:
    """Times of the three forms by round: ``times[form]`` is a list of [forward, backward], seconds; or ``error``, and no times."""
    about_it = {"kernel": name, "shape": asdict(shape), "bytes": list(KERNELS[name].bytes_moved(shape))}
    try:
        inputs, ours, theirs = KERNELS[name].prepare(shape, device)
        off = difference(ours, theirs, inputs)
        if not off <= LARGEST_DIFFERENCE:
            error = f"off its reference by {off:.2g}, of the largest value: nothing to be timed"
            return {**about_it, "difference": off if math.isfinite(off) else None, "error": error}
        times = _times(inputs, ours, theirs, rounds=rounds, calls=calls)
    except RuntimeError as error:
        return {**about_it, "difference": None, "error": f"{type(error).__name__}: {error}"}
    return {**about_it, "difference": off, "times": times}


def _times(
    inputs: list[Tensor], ours: Callable[..., Any], theirs: Callable[..., Any], *, rounds: int, calls: int
) -> dict[str, list[list[float]]]:
    # For the sizes of the case alone, as a training with one shape has it: a second shape would be compiled for symbols.
    forms = {"eager": theirs, "compile": torch.compile(theirs, dynamic=False), "ours": ours}
    passes = []
    for form in forms.values():
        outs, grads = call(form, inputs)
        forward = partial(form, *inputs)
        backward = partial(torch.autograd.grad, outs, inputs, grads, retain_graph=True)
        passes.append(lambda works=(forward, backward): [timed_s(work, calls=calls) for work in works])
    table = take_turns(passes, rounds=rounds, warmup=2)
    return {form: [row[i] for row in table] for i, form in enumerate(forms)}


def ratios(case: dict[str, Any], other: str) -> Spread:
    """Time of ours over another form's, forward and backward together, round by round."""
    return Spread.of([sum(a) / sum(b) for a, b in zip(case["times"]["ours"], case["times"][other], strict=True)])


def verdict(cases: Sequence[dict[str, Any]]) -> str:
    """Of one kernel, from its cases."""
    return "keep" if all("error" not in case and ratios(case, "compile").high <= 1 for case in cases) else "drop"


def results_table(record: dict[str, Any]) -> str:
    """Markdown, from what was measured."""
    peak = record["memory_bytes_per_s"]
    lines = [
        f"Measured on {record['gpu']}; medians of {record['rounds']} rounds, in brackets the quartiles.",
        "",
        "| kernel | shape | forward ms | GB/s | of peak | backward ms | GB/s | of peak | time / eager | time / torch.compile | verdict |",
        "| --- " * 11 + "|",
    ]
    for case in record["cases"]:
        cells = [case["kernel"], case["shape"]["name"]]
        if "error" in case:
            lines.append("| " + " | ".join([*cells, *[DASH] * 8, f"drop: {_in_a_cell(case['error'])}"]) + " |")
            continue
        for way in range(2):
            seconds = Spread.of([times[way] for times in case["times"]["ours"]]).median
            rate = case["bytes"][way] / seconds
            cells += [three(1e3 * seconds), f"{rate / 1e9:.0f}", percent(None if peak is None else rate / peak)]
        for other in ("eager", "compile"):
            ratio = ratios(case, other)
            cells.append(f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        cells.append(verdict([c for c in record["cases"] if c["kernel"] == case["kernel"]]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _in_a_cell(said: str) -> str:
    """Of an error its first line, in a table of Markdown."""
    return said.strip().splitlines()[0].replace("|", "/")


def limits_table(*, bytes_per_s: float) -> str:
    """Markdown: what each kernel moves, and so the least time that one sample of each shape can take. Arithmetic."""
    names = [f"{shape.name}, µs" for shape in PUBLISHED]
    lines = ["| kernel | bytes per token | " + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
    for name, kernel in KERNELS.items():
        for i, way in enumerate(("forward", "backward")):
            moved = [kernel.bytes_moved(shape)[i] // shape.batch for shape in PUBLISHED]
            each = moved[0] * PUBLISHED[0].batch // PUBLISHED[0].tokens
            cells = [f"{name}, {way}", f"{each:,}", *(f"{1e6 * m / bytes_per_s:.1f}" for m in moved)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of results; a folder of the GPU's name is made in it")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    parser.add_argument(
        "--from", type=Path, dest="stored", metavar="FILE", help="show what this kernels.json has, and time nothing"
    )
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, help=f"{FEWEST_ROUNDS} or more (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="of a pass; its time is that of one (default: %(default)s)")
    return parser


def main() -> int:
    """The command line."""
    parser = arguments()
    args = parser.parse_args()
    if args.stored is not None:
        return _show(read_json(args.stored), page=args.page)
    if args.rounds < FEWEST_ROUNDS or args.calls < 1:
        parser.error(f"--rounds must be {FEWEST_ROUNDS} or more, and is {args.rounds}; --calls 1 or more, and is {args.calls}")
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: kernels are timed on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    torch._functorch.config.donated_buffer = False  # a backward is timed again and again on what one forward kept
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    gpu = gpu_for_device(name)
    record = {
        "format": 1,
        "kind": "kernels",
        "gpu": name,
        "memory_bytes_per_s": None if gpu is None else gpu.memory_bytes_per_s,
        "rounds": args.rounds,
        "calls": args.calls,
        "cases": [],
        **about(1),
    }
    for kernel in args.kernels:
        for shape in PUBLISHED:
            print(f"{kernel}, {shape.name}", flush=True)
            record["cases"].append(measure(kernel, shape, device=device, rounds=args.rounds, calls=args.calls))
            torch.cuda.empty_cache()
            if args.out is not None:
                write_json(args.out / ("gpu" if gpu is None else gpu.name) / "kernels.json", record)
    return _show(record, page=args.page)


def _show(record: dict[str, Any], *, page: Path | None) -> int:
    """1 where a kernel has an error."""
    table = results_table(record)
    print(table)
    if page is not None:
        write_table(page, table)
    return 1 if any("error" in case for case in record["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
