"""Checkpoints over two gloo ranks: sharded, replicated, resharded, and failing together."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from opensora_dist.checkpoint import store
from opensora_dist.checkpoint.commit import commit, find_resumable, step_name
from opensora_dist.checkpoint.manifest import read_manifest, verify
from opensora_dist.checkpoint.store import load_tensors, read_tensors, save_tensors
from opensora_dist.core.errors import CheckpointError

WORLD = 2
LIMIT_S = 120


def _whole() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "uneven": torch.randn(5, 3, generator=g),
        "double": torch.randn(7, 2, generator=g, dtype=torch.float64),
        "half": torch.randn(4, 2, generator=g).bfloat16(),
        "one_row": torch.randn(1, 6, generator=g),  # rank 1 holds an empty shard
        "no_row": torch.zeros(0, 6),  # both do
        "scalar": torch.tensor(2.5),
        "replicated": torch.randn(3, generator=g),
        "plain": torch.randn(3, 2, generator=g),
    }


def _spread(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (WORLD,))
    placed: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name == "plain":
            placed[name] = tensor.clone()
        else:
            place = Replicate() if name in ("scalar", "replicated") else Shard(0)
            placed[name] = distribute_tensor(tensor.clone(), mesh, [place])
    return placed


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _commit(root: Path, step: int, tensors: dict[str, Tensor]) -> Path:
    def write(folder: Path) -> None:
        save_tensors(tensors, folder / "model")
        if dist.get_rank() == 0:
            (folder / "trainer.json").write_text("{}")

    return commit(root, step=step, write=write, metadata={"layout": {"world": WORLD}}, keep_last=2)


def _check(rank: int, root: Path) -> None:
    whole = _whole()
    folder = _commit(root, 1, _spread(whole))
    assert folder == root / step_name(1)
    assert set(read_manifest(folder).files) == {
        "trainer.json",
        *(f"model/shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2)),
    }

    loaded = _spread({n: torch.zeros_like(t) for n, t in whole.items()})
    load_tensors(loaded, folder / "model")
    for name, tensor in whole.items():
        assert torch.equal(_full(loaded[name]), tensor), name

    # Written by one process, read by two.
    load_tensors(loaded, root.parent / "one")
    for name, tensor in whole.items():
        assert torch.equal(_full(loaded[name]), tensor + 1), name

    # A misfit on one rank alone is an error on both.
    wrong = dict(loaded, plain=torch.zeros(9 if rank == 1 else 3, 2))
    with _raises("rank 1: .*plain: stored shape"):
        load_tensors(wrong, folder / "model")

    # A full disk on one rank, inside torch's writer: both ranks say so and nothing is left.
    save_file = store.save_file
    if rank == 1:
        store.save_file = _full_disk
    with _raises("rank 1: OSError: .*No space left"):
        _commit(root, 2, loaded)
    store.save_file = save_file

    # The same outside any collective of the writer.
    def write(_: Path) -> None:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with _raises("phase 'write'.*rank 1: OSError: .*No space left"):
        commit(root, step=2, write=write, metadata={}, keep_last=2)
    dist.barrier()
    assert sorted(p.name for p in root.iterdir()) == ["latest", step_name(1)]

    # Damage is found by rank 0 and both ranks fall back alike.
    _commit(root, 3, loaded)
    if rank == 0:
        (root / step_name(3) / "trainer.json").write_text("{ }")
    found = find_resumable(root)
    assert found.path == folder
    assert found.rejected[0].problems == ("trainer.json: 3 bytes, the manifest says 2",)


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def _raises(pattern: str):
    with pytest.raises(CheckpointError, match="(?s)" + pattern):
        yield


def _worker(rank: int, root: Path, errors) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{root.parent}/rendezvous", rank=rank, world_size=WORLD)
        _check(rank, root)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    # Not by returning: a gloo thread that drops its last tensor while the interpreter shuts down ends the process with SIGABRT.
    os._exit(0)


def test_two_ranks_save_reshard_and_fail_together(tmp_path: Path) -> None:
    save_tensors({n: t + 1 for n, t in _whole().items()}, tmp_path / "one")
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(r, tmp_path / "checkpoints", errors)) for r in range(WORLD)]
    for w in workers:
        w.start()
    deadline = time.monotonic() + LIMIT_S
    for w in workers:
        w.join(max(0.0, deadline - time.monotonic()))
    hung = [r for r, w in enumerate(workers) if w.is_alive()]
    for w in workers:
        w.kill()
    said = []
    while not errors.empty():
        said.append(errors.get())
    assert not said, "\n".join(said)
    assert not hung, f"ranks {hung} did not end within {LIMIT_S} s"
    assert [w.exitcode for w in workers] == [0] * WORLD

    # Written by two processes, read by one.
    folder = tmp_path / "checkpoints" / step_name(1)
    assert verify(folder) == []
    whole = read_tensors(folder / "model")
    assert all(torch.equal(whole[n], t) for n, t in _whole().items())
