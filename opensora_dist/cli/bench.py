"""``opensora-dist bench``: what the parts of a training cost here."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path
from typing import Any

from opensora_dist.core.errors import ConfigError


def add_parser(verbs: Any) -> None:
    """Adds the verb and its own verbs."""
    bench = verbs.add_parser(
        "bench", help="time training steps and sequence schemes; measure the network", description="Measure parts of a training."
    )
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_step(actions)
    _add_share(actions)
    _add_sequence(actions)
    _add_network(actions)
    _add_data(actions)


def _add_step(actions: Any) -> None:
    step = actions.add_parser(
        "step",
        help="whole training steps of a model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Time training steps: the training's own forward, backward, clip, optimizer and average, on made-up latents, under a layout of\n"
            "ranks. Says samples/s, tokens/s per rank, model FLOPs use (MFU), peak memory, the share of communication that nothing hides,\n"
            "and with a price dollars per million tokens. Starts its own ranks where a launcher has not.\n\n"
            "  opensora-dist bench step --nproc 2 --depth 4 --width 192 --heads 4 --clip 8x16x16 --sp 2\n"
            "  torchrun --nproc-per-node 8 -m opensora_dist bench step --size XL --clip 16x64x64 --zero 2 --dtype bfloat16\n"
            "  opensora-dist bench step --size XL --clip 64x64x64 --dtype bfloat16 --forms eager compile ours --compare model=stdit,dit\n"
            "  opensora-dist bench step --sweep configs/bench/cpu.yaml --out runs/sweep"
        ),
    )
    # What a training has a default for has none here.
    step.add_argument("--model", choices=["stdit", "dit"], help="default stdit")
    step.add_argument("--size", choices=["S", "B", "L", "XL"], help="published size, patches of 1x2x2 (default S)")
    step.add_argument("--depth", type=int, metavar="L", help="blocks, instead of the size's")
    step.add_argument("--width", type=int, metavar="D", help="instead of the size's")
    step.add_argument("--heads", type=int, metavar="N", help="instead of the size's")
    step.add_argument("--clip", metavar="TxHxW", help="latents of a sample (default 16x32x32: 16 frames of 256 x 256 pixels)")
    step.add_argument("--batch", type=int, metavar="B", help="samples of the ranks that share them (default 1)")
    step.add_argument("--text-tokens", type=int, metavar="Y", help="default 120")
    step.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="default float32")
    step.add_argument("--sp", type=int, metavar="P", help="ranks that share a sample (default 1)")
    step.add_argument("--scheme", metavar="NAME", help="how they do (default dsp)")
    step.add_argument("--ulysses", type=int, metavar="U", help="inner axis of usp")
    step.add_argument("--zero", type=int, metavar="STAGE", help="ZeRO stage, 0 to 3 (default 0)")
    step.add_argument("--dp-replicate", type=int, metavar="R", help="groups of ranks that hold copies (HSDP, default 1)")
    step.add_argument("--grad-accum", type=int, metavar="A", help="micro-batches of a step (default 1)")
    step.add_argument("--recompute", choices=["none", "selective", "full"], help="what backward runs again (default none)")
    step.add_argument(
        "--forms",
        nargs="+",
        default=["eager"],
        metavar="NAME",
        help="ways of computing the step, side by side: eager (torch's operators), compile (the same, compiled), ours (this project's "
        "kernels, compiled; needs a GPU). Default eager",
    )
    step.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="KEY=A,B",
        help="cases side by side, too: model=stdit,dit or size=S,B or recompute=none,selective,full",
    )
    step.add_argument("--rounds", type=int, default=5, metavar="R", help="passes of each form that count (default 5)")
    step.add_argument("--warmup", type=int, default=2, metavar="R", help="passes before them (default 2)")
    step.add_argument("--steps", type=int, default=3, metavar="S", help="steps of a pass (default 3)")
    step.add_argument(
        "--dollars-per-gpu-hour", type=float, metavar="USD", help="what a GPU costs, for dollars per million tokens"
    )
    step.add_argument("--out", type=Path, metavar="DIR", help="folder for step.json; with --sweep, for everything")
    _add_ranks(step)
    _add_sweep(step)
    step.set_defaults(run=_run_step)


def _add_share(actions: Any) -> None:
    share = actions.add_parser(
        "share",
        help="one rank's share of a sequence that many ranks hold, alone on this device",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run the training step of rank 0 of many ranks that share a sample, without the others: its tokens, its shards, the buffers of\n"
            "its all-to-alls, but nothing sent. Levers are those that the planner finds fastest within --memory-cap-gib. Says the peak that\n"
            "the planner predicts beside the one that was measured; exits with 1 where they differ by more than a tenth. The defaults are\n"
            "one minute of 1080p at 24 frames a second, by a codec of 8x8 and 4 in time, on eight GPUs of 80 GB.\n\n"
            "  opensora-dist bench share --form ours --out runs/share"
        ),
    )
    share.add_argument("--model", choices=["stdit", "dit"], default="stdit", help="default stdit")
    share.add_argument("--size", choices=["S", "B", "L", "XL"], default="XL", help="published size (default XL)")
    share.add_argument("--clip", default="360x136x240", metavar="TxHxW", help="latents of the whole sample (default 360x136x240)")
    share.add_argument("--ranks", type=int, default=8, metavar="P", help="that share it (default 8)")
    share.add_argument("--scheme", default="dsp", metavar="NAME", help="how they do (default dsp)")
    share.add_argument("--text-tokens", type=int, default=120, metavar="Y", help="default 120")
    share.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default bfloat16")
    share.add_argument("--form", default="eager", metavar="NAME", help="eager, compile or ours (default eager)")
    share.add_argument("--memory-cap-gib", type=float, default=80.0, metavar="G", help="of the device's memory (default 80)")
    share.add_argument("--host-gib", type=float, default=120.0, metavar="G", help="CPU memory that levers may fill (default 120)")
    share.add_argument("--gpu", default="h100", metavar="NAME", help="whose speed the planner reckons with (default h100)")
    share.add_argument("--steps", type=int, default=2, metavar="S", help="after the first (default 2)")
    share.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    share.add_argument("--out", type=Path, metavar="DIR", help="folder for share.json")
    share.set_defaults(run=_run_share)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="run every point of this grid instead, on this machine or over the nodes of a Slurm job, and go on where an earlier one stopped",
    )


def _add_sequence(actions: Any) -> None:
    sequence = actions.add_parser(
        "sequence",
        help="one transformer block under every sequence scheme",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Time forward and backward of one transformer block whose samples all ranks share: every sequence scheme that fits,\n"
            "overlapped and blocking, beside DeepSpeed's DistributedAttention and yunchang's SeqAllToAll4D where they are installed.\n"
            "Each form is checked against one process first, and its bytes against the formula. Starts its own ranks where a launcher\n"
            "has not.\n\n"
            "  opensora-dist bench sequence --nproc 2 --grid 16x16x16 --width 384 --heads 8 --out runs/bench\n"
            "  torchrun --nproc-per-node 8 -m opensora_dist bench sequence --dtype bfloat16 --width 1152 --heads 16 --grid 64x32x32"
        ),
    )
    sequence.add_argument("--model", choices=["stdit", "dit"], default="stdit", help="whose block (default stdit)")
    sequence.add_argument("--batch", type=int, default=1, metavar="B", help="samples (default 1)")
    sequence.add_argument("--grid", default="16x16x16", metavar="TxHxW", help="tokens of a sample (default 16x16x16)")
    sequence.add_argument("--width", type=int, default=384, metavar="D", help="of the model (default 384)")
    sequence.add_argument("--heads", type=int, default=8, metavar="N", help="default 8")
    sequence.add_argument("--text-tokens", type=int, default=120, metavar="Y", help="default 120")
    sequence.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="default float32")
    sequence.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="what backward runs again")
    sequence.add_argument("--schemes", nargs="+", metavar="NAME", help="these only; deepspeed and yunchang are names, too")
    sequence.add_argument("--chunks", type=int, metavar="K", help="pieces of a pipeline (default: that of parallel.sp.chunks)")
    sequence.add_argument("--ulysses", type=int, metavar="U", help="inner axis of usp (default: the smallest above 1 that fits)")
    sequence.add_argument("--fastseq-dw", choices=["gather", "keep"], help="default: that of parallel.sp.fastseq_dw")
    sequence.add_argument("--rounds", type=int, default=9, metavar="R", help="passes of each form that count (default 9)")
    sequence.add_argument("--warmup", type=int, default=2, metavar="R", help="passes before them (default 2)")
    sequence.add_argument("--trace", action="store_true", help="write a Chrome trace per rank into --out")
    sequence.add_argument("--out", type=Path, metavar="DIR", help="folder for sequence.json, sequence.svg and traces")
    _add_ranks(sequence)
    _add_sweep(sequence)
    sequence.set_defaults(run=_run_sequence)


def _add_network(actions: Any) -> None:
    network = actions.add_parser(
        "network",
        help="bandwidth, latency and matrix products of the ranks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Measure what ranks can send each other and compute. parallel.sp.scheme=auto predicts with these numbers: it measures them\n"
            "itself when a run starts, or reads them from the file that parallel.sp.network names.\n\n"
            "  opensora-dist bench network --nproc 2 --width 1152 --out network.json"
        ),
    )
    network.add_argument("--width", type=int, default=1152, metavar="D", help="of the matrix products (default 1152)")
    network.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="default float32")
    network.add_argument("--out", type=Path, metavar="FILE", help="where to write the measurement, as JSON")
    _add_ranks(network)
    network.set_defaults(run=_run_network)


def _add_data(actions: Any) -> None:
    data = actions.add_parser(
        "data",
        help="samples per second of reader and loader, beside plain reads and other packages",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Read samples of 1.1 MB and 3.1 MB, from the page cache and from the disk: plainly, by this project's reader and loader, by\n"
            "webdataset (alone and through a DataLoader), wids and MosaicML streaming where they are installed. All take turns.\n"
            "Exits with 1 where a bar is not met.\n\n"
            "  opensora-dist bench data --out data.json\n"
            "  opensora-dist bench data --python loaders/bin/python   # another environment has the other packages (docs/reading.md)"
        ),
    )
    data.add_argument("--mib", type=int, default=2048, metavar="N", help="size of each data set (default 2048)")
    data.add_argument("--rounds", type=int, default=7, metavar="R", help="passes of each way that count (default 7)")
    data.add_argument("--batch", type=int, default=8, metavar="B", help="samples of a batch (default 8)")
    data.add_argument("--threads", type=int, default=2, metavar="T", help="that read; or worker processes of others (default 2)")
    data.add_argument("--disk-threads", type=int, default=4, metavar="T", help="that read from the disk (default 4)")
    data.add_argument("--python", metavar="PATH", help="interpreter that has the other packages (default: this one)")
    data.add_argument("--work", type=Path, metavar="DIR", help="folder on the disk to measure (default: the temporary folder)")
    data.add_argument("--out", type=Path, metavar="FILE", help="where to write the measurement, as JSON")
    data.add_argument("--page", type=Path, metavar="FILE", help="Markdown page whose table is replaced")
    data.set_defaults(run=_run_data)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, metavar="P", help="ranks to start (default: one per GPU, or 2)")
    parser.add_argument("--pin", action="store_true", help="each rank keeps to cores of its own")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds of a stuck transfer (default 600)")


def _check_ranks(args: argparse.Namespace, **more: int) -> None:
    """
    Raises:
        ConfigError: Fewer ranks than one, or no time; or one of ``more``, which are options by name, is below 1.
    """
    whole = {**more, **({} if args.nproc is None else {"nproc": args.nproc})}
    problems = [f"--{name} must be 1 or more, and is {value}" for name, value in whole.items() if value < 1]
    if not 0 < args.timeout < math.inf:
        problems.append(f"--timeout must be a number of seconds above 0, and is {args.timeout:g}")
    if problems:
        raise ConfigError(problems)


def _run_step(args: argparse.Namespace) -> int:
    if args.sweep is not None:
        return _run_sweep(args)
    from opensora_dist.parallel.mesh import resolve_device
    from opensora_dist.recipes.bench.launch import num_ranks, on_ranks
    from opensora_dist.recipes.bench.step_inputs import CASE_FIELDS, step_inputs
    from opensora_dist.recipes.bench.step_show import step_rank

    _check_ranks(args)
    variants, options = step_inputs(
        {name: getattr(args, name) for name in CASE_FIELDS},
        world=num_ranks(args.nproc, device=args.device),
        timeout_s=args.timeout,
        device=resolve_device(args.device),
        compare=args.compare,
        **{name: getattr(args, name) for name in ("forms", "rounds", "warmup", "steps", "dollars_per_gpu_hour")},
    )
    return on_ranks(
        lambda device: step_rank(variants, device, options=options, out=args.out),
        args=args.argv,
        nproc=args.nproc,
        device=args.device,
        pin=args.pin,
        out=args.out,
        timeout_s=args.timeout,
    )


def _run_share(args: argparse.Namespace) -> int:
    from opensora_dist.parallel.mesh import resolve_device
    from opensora_dist.recipes.bench.share import planned_case, share_command
    from opensora_dist.recipes.bench.step_inputs import check_share, step_case

    device = resolve_device(args.device)
    check_share(
        form=args.form,
        ranks=args.ranks,
        steps=args.steps,
        gib=(args.memory_cap_gib, args.host_gib),
        device=device,
        dtype=args.dtype,
    )
    given = {name: getattr(args, name) for name in ("model", "size", "clip", "scheme", "text_tokens", "dtype")}
    case = step_case({**given, "sp": args.ranks, "zero": 2}, world=args.ranks, timeout_s=600.0)
    cap_bytes = int(args.memory_cap_gib * 2**30)
    case = planned_case(case, form=args.form, cap_bytes=cap_bytes, host_bytes=int(args.host_gib * 2**30), gpu=args.gpu)
    cap = cap_bytes if device.type == "cuda" else None
    return share_command(case, device=device, form=args.form, steps=args.steps, cap_bytes=cap, out=args.out)


def _run_sweep(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.bench.sweep import run_sweep

    words = [word.partition("=")[0] for word in args.argv if word.startswith("--")]
    problems = [f"{word} with --sweep, whose file says it all; drop it" for word in words if word not in ("--sweep", "--out")]
    if args.out is None:
        problems.append("--sweep writes a file per point into --out, which is not given; add --out DIR")
    if problems:
        raise ConfigError(problems)
    return run_sweep(args.action, args.sweep, out=args.out)


def _run_sequence(args: argparse.Namespace) -> int:
    if args.sweep is not None:
        return _run_sweep(args)
    from opensora_dist.recipes.bench.launch import num_ranks, on_ranks, sequence_rank
    from opensora_dist.recipes.bench.sequence import sequence_inputs

    _check_ranks(args)
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", args.grid)
    if not match:
        raise ConfigError(f"--grid {args.grid!r} is not FRAMESxROWSxCOLUMNS; write e.g. 16x16x16")
    if args.trace and args.out is None:
        raise ConfigError("--trace writes one file per rank into --out, which is not given; add --out DIR")
    case, options = sequence_inputs(
        model=args.model,
        batch=args.batch,
        grid=tuple(map(int, match.groups())),
        width=args.width,
        heads=args.heads,
        text_tokens=args.text_tokens,
        dtype=args.dtype,
        recompute=args.recompute,
        schemes=args.schemes,
        chunks=args.chunks,
        ulysses=args.ulysses,
        fastseq_dw=args.fastseq_dw,
        rounds=args.rounds,
        warmup=args.warmup,
        timeout_s=args.timeout,
        world=num_ranks(args.nproc, device=args.device),
    )
    return on_ranks(
        lambda device: sequence_rank(case, device, options=options, out=args.out, trace=args.trace),
        args=args.argv,
        nproc=args.nproc,
        device=args.device,
        pin=args.pin,
        out=args.out,
        timeout_s=args.timeout,
    )


def _run_network(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.bench.case import DTYPES
    from opensora_dist.recipes.bench.launch import on_ranks
    from opensora_dist.recipes.bench.network import network_rank

    _check_ranks(args, width=args.width)
    return on_ranks(
        lambda device: network_rank(device, width=args.width, dtype=DTYPES[args.dtype], out=args.out),
        args=args.argv,
        nproc=args.nproc,
        device=args.device,
        pin=args.pin,
        out=None,
        timeout_s=args.timeout,
    )


def _run_data(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.bench.data import DataOptions, bench_data

    counts = {
        "mib": args.mib,
        "rounds": args.rounds,
        "batch": args.batch,
        "threads": args.threads,
        "disk_threads": args.disk_threads,
    }
    problems = [f"--{name} must be 1 or more, and is {value}" for name, value in counts.items() if value < 1]
    if args.work is not None and not args.work.is_dir():
        problems.append(f"--work {args.work} is no folder; name one on the disk that is to be measured")
    if args.python is not None and shutil.which(args.python) is None:
        problems.append(f"--python {args.python} is no program; name an interpreter, as in loaders/bin/python")
    if problems:
        raise ConfigError(problems)
    options = DataOptions(
        num_bytes=args.mib << 20,
        rounds=args.rounds,
        batch=args.batch,
        threads=args.threads,
        disk_threads=args.disk_threads,
        python=args.python,
        work=args.work,
    )
    return 0 if bench_data(options, out=args.out, page=args.page) else 1
