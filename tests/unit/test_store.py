"""Tensors in safetensors: what is written is what is read, and what doesn't fit is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_dist.checkpoint.store import load_tensors, read_tensors, save_tensors
from opensora_dist.core.errors import CheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "model.a.weight": torch.randn(5, 3, generator=g),
        "model.double": torch.randn(4, generator=g, dtype=torch.float64),
        "model.half": torch.randn(2, 2, 2, generator=g).bfloat16(),
        "model.transposed": torch.randn(3, 4, generator=g).t(),
        "model.view": torch.randn(10, generator=g)[2:5],
        "optim.count": torch.tensor(7),
        "optim.scale": torch.tensor(0.25, dtype=torch.float64),
        "optim.flags": torch.tensor([True, False]),
        "optim.empty": torch.zeros(0, 4),
    }


def test_every_dtype_and_shape_comes_back_bitwise(tmp_path: Path) -> None:
    saved = _tensors()
    save_tensors(saved, tmp_path / "t")
    loaded = {name: torch.empty_like(t) for name, t in saved.items()}
    load_tensors(loaded, tmp_path / "t")
    for name, t in saved.items():
        assert torch.equal(loaded[name], t), name
    whole = read_tensors(tmp_path / "t")
    assert whole.keys() == saved.keys()
    assert all(torch.equal(whole[n], t) and whole[n].dtype == t.dtype for n, t in saved.items())


def test_load_fills_the_tensors_it_was_given_even_where_they_need_grad(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.full((2, 2), 3.0))
    save_tensors({"w": weight}, tmp_path)
    target = torch.nn.Parameter(torch.zeros(2, 2))
    address = target.data_ptr()
    load_tensors({"w": target}, tmp_path)
    assert target.data_ptr() == address
    assert torch.equal(target, weight)


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    save_tensors(_tensors(), tmp_path / "t")
    assert [p.suffix for p in (tmp_path / "t").iterdir()] == [".safetensors"]


def test_prefix_reads_a_part(tmp_path: Path) -> None:
    save_tensors(_tensors(), tmp_path)
    assert set(read_tensors(tmp_path, prefix="optim.")) == {n for n in _tensors() if n.startswith("optim.")}
    with pytest.raises(CheckpointError, match="no tensor named ema"):
        read_tensors(tmp_path, prefix="ema.")


def test_a_part_of_the_names_may_be_loaded(tmp_path: Path) -> None:
    save_tensors(_tensors(), tmp_path)
    target = {"optim.count": torch.tensor(0)}
    load_tensors(target, tmp_path)
    assert target["optim.count"] == 7


def test_all_misfits_are_listed_at_once_and_nothing_is_loaded(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2)}, tmp_path)
    good = torch.zeros(2)
    wanted = {"c": good, "a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.float64), "new": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_tensors(wanted, tmp_path)
    text = str(caught.value)
    assert "a: stored shape (3,), wanted (4,)" in text
    assert "b: stored as torch.float32, wanted torch.float64" in text
    assert "new: not in the checkpoint" in text
    assert torch.equal(good, torch.zeros(2))


def test_a_missing_shard_in_the_middle_is_noticed(tmp_path: Path) -> None:
    def shard(index: int, offset: int) -> None:
        save_file(
            {"w": torch.ones(2)},
            tmp_path / f"shard-{index}.safetensors",
            metadata={"DCP_SHARDING_INFO": f'{{"w": {{"saved_offsets": [{offset}]}}}}'},
        )

    shard(1, 0)
    shard(3, 4)
    with pytest.raises(CheckpointError, match="w: shards are missing"):
        load_tensors({"w": torch.zeros(6)}, tmp_path)
    shard(2, 2)
    load_tensors({"w": (target := torch.zeros(6))}, tmp_path)
    assert torch.equal(target, torch.ones(6))


def test_a_folder_with_shards_of_another_save_is_refused(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path)
    with pytest.raises(CheckpointError, match="already holds"):
        save_tensors({"a": torch.ones(3)}, tmp_path)


@pytest.mark.parametrize("read", [read_tensors, lambda folder: load_tensors({"a": torch.zeros(3)}, folder)])
def test_damage_and_absence_are_checkpoint_errors(tmp_path: Path, read) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read(tmp_path / "nowhere")
    save_tensors({"a": torch.ones(3)}, tmp_path / "t")
    (file,) = (tmp_path / "t").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="can't"):
        read(tmp_path / "t")
