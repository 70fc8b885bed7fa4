"""Reads the samples of ``bench data`` as other packages do. A script of its own, run by any interpreter that has them.

It imports nothing of this project: MosaicML streaming, for one, needs another torch and numpy than training does. Requests come as lines
of JSON on the standard input, answers go to the standard output; whatever packages print goes to the standard error.

    {"do": "open", "name": NAME, "folder": FOLDER, "work": FOLDER, "shards": [[file, samples], ...], "batch": B, "workers": W}
        -> {"version": ...} or {"missing": why}
    {"do": "pass", "name": NAME}  -> {"samples": n, "seconds": s}: all samples once, as batches of stacked arrays
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pass = Callable[[], Iterator[int]]
"""Yields, batch by batch, how many samples there were."""


def webdataset(case: Mapping[str, Any]) -> Pass:
    """Its pipeline in this process, with its own decoder."""
    pipeline = _webdataset_batches(case)
    return lambda: (len(batch[0]) for batch in pipeline)


def webdataset_loader(case: Mapping[str, Any]) -> Pass:
    """Its pipeline through a DataLoader, whose workers live on from pass to pass."""
    data = importlib.import_module("torch.utils.data")
    loader = data.DataLoader(
        _webdataset_batches(case), batch_size=None, num_workers=case["workers"], persistent_workers=case["workers"] > 0
    )
    return lambda: (len(batch[0]) for batch in loader)


def _webdataset_batches(case: Mapping[str, Any]) -> Any:
    wds = importlib.import_module("webdataset")
    files = [str(Path(case["folder"], name)) for name, _ in case["shards"]]
    samples = wds.WebDataset(files, shardshuffle=False, empty_check=False).decode().to_tuple("latents.npy", "text.npy")
    return samples.batched(case["batch"])


def wids(case: Mapping[str, Any]) -> Pass:
    """Its index into the same shards, in a random order; arrays decoded by numpy."""
    found = importlib.import_module("wids")
    shards = [{"url": str(Path(case["folder"], name)), "nsamples": count} for name, count in case["shards"]]
    dataset = found.ShardListDataset(shards, localname=str, keep=True, transformations="numpy", options={})
    order = sorted(range(len(dataset)), key=lambda i: i * 2654435761 % 2**32)  # as good as random

    def batches() -> Iterator[int]:
        for start in range(0, len(order), case["batch"]):
            samples = [dataset[i] for i in order[start : start + case["batch"]]]
            yield _stacked([(_array(s[".latents.npy"]), _array(s[".text.npy"])) for s in samples])

    return batches


def _array(value: Any) -> Any:
    """What a decoder may have left to do."""
    return value if isinstance(value, np.ndarray) else np.load(value)


def mds(case: Mapping[str, Any]) -> Pass:
    """MosaicML streaming: the same arrays in its own format, in its own shuffled order."""
    streaming = importlib.import_module("streaming")
    folder = Path(case["work"], "mds")
    shutil.rmtree(folder, ignore_errors=True)
    streaming.base.util.clean_stale_shared_memory()
    with streaming.MDSWriter(out=str(folder), columns={"latents": "ndarray", "text": "ndarray"}) as writer:
        for latents, text in _stored(case):
            writer.write({"latents": latents, "text": text})
    dataset = streaming.StreamingDataset(local=str(folder), batch_size=case["batch"], shuffle=True)

    def batches() -> Iterator[int]:
        some: list[tuple[Any, Any]] = []
        for sample in dataset:
            some.append((sample["latents"], sample["text"]))
            if len(some) == case["batch"]:
                yield _stacked(some)
                some = []
        if some:
            yield _stacked(some)

    return batches


def _stored(case: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arrays of all samples."""
    tarfile = importlib.import_module("tarfile")
    for name, _ in case["shards"]:
        with tarfile.open(Path(case["folder"], name)) as tar:
            latents = None
            for member in tar:
                if member.name.endswith(".latents.npy"):
                    latents = np.load(io.BytesIO(tar.extractfile(member).read()))
                elif member.name.endswith(".text.npy"):
                    yield latents, np.load(io.BytesIO(tar.extractfile(member).read()))


def _stacked(samples: Sequence[tuple[Any, Any]]) -> int:
    return min(len(np.stack(arrays)) for arrays in zip(*samples))


WAYS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], Pass]]] = {
    "webdataset": ("webdataset", "webdataset", webdataset),
    "webdataset, DataLoader": ("webdataset", "webdataset", webdataset_loader),
    "wids": ("wids", "wids", wids),
    "MosaicML streaming": ("streaming", "mosaicml-streaming", mds),
}
"""Name to module, package, and what opens it."""


def answer(request: Mapping[str, Any], opened: dict[str, Pass]) -> dict[str, Any]:
    """Does what is asked."""
    name = request["name"]
    module, package, way = WAYS[name]
    if request["do"] == "open":
        try:
            importlib.import_module(module)
        except ImportError as error:
            return {"missing": f"{package} can't be imported ({error})"}
        opened[name] = way(request)
        return {"version": importlib.metadata.version(package)}
    began = time.perf_counter()
    samples = sum(opened[name]())
    return {"samples": samples, "seconds": time.perf_counter() - began}


def main() -> None:
    """Answers until the input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        opened: dict[str, Pass] = {}
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), opened)), file=answers, flush=True)


if __name__ == "__main__":
    main()
