"""What can't be compiled, or replayed as CUDA graphs."""

from __future__ import annotations

from opensora_dist.config.load import Problem
from opensora_dist.config.train import TrainConfig

_REPLAYS = "run.compile=graphs replays recorded kernels on the same addresses"


def compile_problems(config: TrainConfig) -> list[Problem]:
    """Rules of ``run.compile``."""
    if config.run.compile == "off":
        return []
    zero = config.parallel.zero
    if zero.backend != "native":
        message = (
            f"run.compile={config.run.compile} with parallel.zero.backend={zero.backend}, whose hooks inside of blocks a compiler can't "
            "follow; use run.compile=off, or parallel.zero.backend=native"
        )
        return [Problem(fields=("run.compile", "parallel.zero.backend"), message=message)]
    return _graphs_problems(config) if config.run.compile == "graphs" else []


def _graphs_problems(config: TrainConfig) -> list[Problem]:
    parallel, problems = config.parallel, list[Problem]()

    def refuse(field: str, value: object, *, because: str, instead: str) -> None:
        message = f"{_REPLAYS}, and {field}={value} {because}; use run.compile=blocks, or {instead}"
        problems.append(Problem(fields=("run.compile", field), message=message))

    if config.run.device == "cpu":
        refuse("run.device", "cpu", because="has no CUDA graphs", instead="run.device=cuda")
    if parallel.zero.stage > 0:
        because = "gathers weights to other addresses at each step"
        refuse("parallel.zero.stage", parallel.zero.stage, because=because, instead="parallel.zero.stage=0")
    if parallel.sp.degree > 1:
        because = "communicates inside of blocks"
        refuse("parallel.sp.degree", parallel.sp.degree, because=because, instead="parallel.sp.degree=1")
    if parallel.offload_activations:
        because = "brings activations back to other ones"
        refuse("parallel.offload_activations", "true", because=because, instead="parallel.offload_activations=false")
    if parallel.tile_tokens is not None:
        because = "runs as many tiles as a shape has"
        refuse("parallel.tile_tokens", parallel.tile_tokens, because=because, instead="no parallel.tile_tokens")
    if config.data.batching == "packed":
        because = "makes packs of ever other sizes"
        refuse("data.batching", "packed", because=because, instead="data.batching=samples")
    return problems
