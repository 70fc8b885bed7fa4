"""Rules of section ``data`` that need no data set: what is trained on, and how samples become units of a batch."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from opensora_dist.config.load import Problem, expand
from opensora_dist.config.train import DataConfig, MixtureConfig, TrainConfig
from opensora_dist.core.urls import PIPE, expand_braces, is_remote, redact, secret_in


def data_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """Every one, for a run of ``world`` ranks."""
    return [
        *_source_problems(config.data),
        *_mixture_problems(config.data),
        *_unit_problems(config.data),
        *_reading_problems(config.data),
        *_division_problems(config, world=world),
        *_auto_problems(config),
    ]


def mixture_name(entry: MixtureConfig) -> str:
    """What the keys of its samples begin with: the name it is given, or the last part of its path."""
    return entry.name or PurePosixPath(entry.path.partition("?")[0].rstrip("/")).name


def _source_problems(data: DataConfig) -> list[Problem]:
    """Where the samples are: one data set, or a mixture."""
    if data.path is None and not data.mixture:
        message = (
            "data.path is not set; make a data set with `opensora-dist data prepare` and pass data.path=FOLDER, "
            "or list several under data.mixture"
        )
        return [Problem(fields=("data.path",), message=message)]
    problems = []
    if data.mixture:
        if data.path is not None:
            message = (
                f"data.path={redact(data.path)!r} and data.mixture of {len(data.mixture)} are both set, and data.mixture stands in "
                "data.path's place; keep one of them, or list the path in the mixture, too"
            )
            problems.append(Problem(fields=("data.path", "data.mixture"), message=message))
        if data.layout is not None:
            message = f"data.layout={redact(data.layout)!r} is of data.path; with data.mixture give each of its data sets a layout of its own"
            problems.append(Problem(fields=("data.layout", "data.mixture"), message=message))
    else:
        problems += _place_problems("data.path", data.path or "", data)
    problems += _layout_problems("data.layout", data.layout)
    for i, entry in enumerate(data.mixture):
        problems += _place_problems(f"data.mixture[{i}].path", entry.path, data)
        problems += _layout_problems(f"data.mixture[{i}].layout", entry.layout)
    return problems


def _layout_problems(field: str, layout: str | None) -> list[Problem]:
    """Of the file that describes tars. ``data.allow_pipe`` is about where data comes from: a description is a file."""
    said = None if layout is None else layout_problem(layout)
    return [] if said is None else [Problem(fields=(field,), message=f"{field}={said}")]


def layout_problem(layout: str) -> str | None:
    """Why a file can't describe tars: what follows the field's name in a message."""
    if layout.startswith(PIPE):
        return f"{redact(layout)!r} is a command, and a layout is read from a file or a URL only; write its output to a file and name that"
    return secret_in(layout)


def _place_problems(field: str, path: str, data: DataConfig) -> list[Problem]:
    """Of one data set's path or URL. Whether a remote one is there is asked when it is opened."""
    shown = f"{field}={redact(path)!r}"
    if (secret := secret_in(path)) is not None:
        return [Problem(fields=(field,), message=f"{field}={secret}")]
    if path.startswith(PIPE) and not data.allow_pipe:
        message = f"{shown} runs a command of this machine; set data.allow_pipe=true if you trust whoever wrote this config, or name a URL"
        return [Problem(fields=(field, "data.allow_pipe"), message=message)]
    if is_remote(path):
        return []
    here = str(expand(path.removeprefix("file://")))
    if expand(here).is_dir() or (here.endswith(".tar") and all(expand(name).is_file() for name in expand_braces(here)[:1])):
        return []
    message = f"{shown} is not a folder; make it with `opensora-dist data prepare`, or correct the path"
    return [Problem(fields=(field,), message=message, here=True)]


def _mixture_problems(data: DataConfig) -> list[Problem]:
    """Names begin keys, so that they must differ; weights are of all or of none, as a share and a count can't be compared."""
    problems = []
    counts = Counter(mixture_name(entry) for entry in data.mixture)
    for name, count in counts.items():
        if count > 1:
            message = f"data.mixture has {count} data sets named {name!r}, and keys of samples begin with that; give each a name of its own"
            problems.append(Problem(fields=("data.mixture",), message=message))
        if not name or "/" in name:
            message = f"data.mixture has a data set named {name!r}; a name must have a letter, and no slash: give it data.mixture[].name"
            problems.append(Problem(fields=("data.mixture",), message=message))
    without = [mixture_name(entry) for entry in data.mixture if entry.weight is None]
    if without and len(without) < len(data.mixture):
        message = (
            f"data.mixture gives no weight to {', '.join(without)}, and one to the others; give all of them a weight, or none "
            "(then each counts by its samples)"
        )
        problems.append(Problem(fields=("data.mixture",), message=message))
    return problems


def _unit_problems(data: DataConfig) -> list[Problem]:
    """``unit_tokens`` belongs to units that have a budget."""
    fields = ("data.unit_tokens", "data.batching")
    if data.batching == "samples" and data.unit_tokens is not None:
        message = (
            f"data.unit_tokens={data.unit_tokens} with data.batching=samples, whose units are single samples; drop it, or use "
            "data.batching=tokens or packed"
        )
        return [Problem(fields=fields, message=message)]
    if data.batching != "samples" and data.unit_tokens is None:
        message = (
            f"data.batching={data.batching} needs data.unit_tokens, the tokens of a unit at most, and it is not set; start with those of "
            "your largest clip, or use data.batching=samples"
        )
        return [Problem(fields=fields, message=message)]
    return []


def _reading_problems(data: DataConfig) -> list[Problem]:
    """A thread reads a micro-batch at a time, into a slot of its own: one without a slot has nothing to do."""
    if data.reader_threads <= data.prefetch_batches:
        return []
    message = (
        f"data.reader_threads={data.reader_threads} is more than data.prefetch_batches={data.prefetch_batches}, and each thread reads a "
        f"micro-batch of its own; use data.prefetch_batches={data.reader_threads + 1}, or data.reader_threads={data.prefetch_batches}"
    )
    return [Problem(fields=("data.reader_threads", "data.prefetch_batches"), message=message)]


def _division_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """Units are dealt out to data ranks and micro-batches whole, the same number to each."""
    parallel, data = config.parallel, config.data
    # Where auto may spread a sample over fewer ranks, more of them see different samples.
    degree = parallel.sp.min_degree or parallel.sp.degree if parallel.sp.scheme == "auto" else parallel.sp.degree
    sharing = degree * parallel.tp
    data_ranks = world // sharing
    pieces = data_ranks * parallel.grad_accum
    if world % sharing or data.global_batch % pieces == 0:
        return []
    up = (data.global_batch // pieces + 1) * pieces
    of = f" (= {world} ranks / {sharing} that share a sample)" if sharing > 1 else ""
    units = "" if data.batching == "samples" else f" units of data.batching={data.batching}"
    message = (
        f"data.global_batch={data.global_batch}{units} must be a multiple of data ranks{of} x parallel.grad_accum = {data_ranks} x "
        f"{parallel.grad_accum} = {pieces}; use {up}" + (f" or {up - pieces}" if up > pieces else "")
    )
    sizes = ("parallel.sp.degree", "parallel.sp.min_degree", "parallel.tp")
    fields = ("data.global_batch", "parallel.grad_accum", "parallel.nproc", *sizes)
    return [Problem(fields=fields, message=message)]


def _auto_problems(config: TrainConfig) -> list[Problem]:
    """A pack is one sequence of one group of ranks, and ``auto`` with a lower bound may choose another group for each shape in it."""
    sp = config.parallel.sp
    if config.data.batching != "packed" or sp.scheme != "auto" or sp.min_degree in (None, sp.degree):
        return []
    message = (
        f"data.batching=packed with parallel.sp.min_degree={sp.min_degree} below parallel.sp.degree={sp.degree}: samples of a pack may have "
        f"any shape, and auto would share them among different numbers of ranks; use parallel.sp.min_degree={sp.degree} or none, or "
        "data.batching=tokens, whose batches have one shape"
    )
    return [Problem(fields=("data.batching", "parallel.sp.min_degree", "parallel.sp.degree"), message=message)]
