"""The commit protocol, one process: killed or failing anywhere, what was committed before can be used."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from opensora_dist.checkpoint import commit as commit_module
from opensora_dist.checkpoint.commit import LATEST_NAME, SAVE_PHASES, commit, find_resumable, resolve, step_name
from opensora_dist.checkpoint.manifest import read_manifest, verify
from opensora_dist.checkpoint.store import read_tensors, save_tensors
from opensora_dist.core.errors import CheckpointError


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def _save(
    root: Path,
    step: int,
    *,
    value: float | None = None,
    keep_last: int = 3,
    on_phase: Callable[[str], None] = lambda _: None,
    rejected: Sequence[str] = (),
) -> Path:
    def write(folder: Path) -> None:
        save_tensors({"w": torch.full((8,), float(step) if value is None else value)}, folder / "model")
        (folder / "trainer.json").write_text(json.dumps({"step": step}))

    metadata = {"config_hash": "c0", "layout": {"world": 1}}
    return commit(root, step=step, write=write, metadata=metadata, keep_last=keep_last, on_phase=on_phase, rejected=rejected)


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def _value(folder: Path | None) -> float:
    assert folder is not None
    return float(read_tensors(folder / "model")["w"][0])


def test_a_commit_verifies_and_latest_names_it(tmp_path: Path) -> None:
    folder = _save(tmp_path / "checkpoints", 5)
    assert folder.name == step_name(5)
    assert verify(folder) == []
    assert (folder.parent / LATEST_NAME).read_text().strip() == folder.name
    assert read_manifest(folder).metadata["layout"] == {"world": 1}
    assert find_resumable(folder.parent).path == folder


def test_old_ones_are_pruned_and_the_new_one_never_is(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep_last=2)
    assert _names(tmp_path) == [LATEST_NAME, step_name(3), step_name(4)]
    _save(tmp_path, 5, keep_last=1)
    assert _names(tmp_path) == [LATEST_NAME, step_name(5)]


def test_pruning_after_a_fallback_keeps_the_only_verified_one(tmp_path: Path) -> None:
    for step in (10, 20):
        _save(tmp_path, step)
    (tmp_path / step_name(20) / "trainer.json").write_text("damaged")
    _save(tmp_path, 15, keep_last=1)  # resumed from 10
    found = find_resumable(tmp_path)
    assert found.path == tmp_path / step_name(15)
    assert [r.path.name for r in found.rejected] == [step_name(20)]


@pytest.mark.parametrize("phase", ["stage", "write", "list", "hash", "publish"])
def test_a_failure_in_any_phase_leaves_the_old_checkpoint_and_no_partial(tmp_path: Path, monkeypatch, phase: str) -> None:
    _save(tmp_path, 1)
    together = commit_module._together

    def failing(name, action, group):
        def full_disk():
            action()
            raise OSError(errno.ENOSPC, "No space left on device")

        return together(name, full_disk if name == phase else action, group)

    monkeypatch.setattr(commit_module, "_together", failing)
    with pytest.raises(CheckpointError, match=f"phase '{phase}'.*\n.*rank 0: OSError.*No space left"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert not [n for n in _names(tmp_path) if "partial" in n]
    assert verify(tmp_path / step_name(1)) == []
    if phase != "publish":  # there it failed only after the rename
        assert find_resumable(tmp_path).path == tmp_path / step_name(1)
    assert _value(_save(tmp_path, 3)) == 3.0


@pytest.mark.parametrize("phase, broken", [("manifest", "write_manifest"), ("flush", "fsync")])
def test_a_failure_of_the_first_rank_alone_names_the_phase_it_was_in(
    tmp_path: Path, monkeypatch, phase: str, broken: str
) -> None:
    monkeypatch.setattr(commit_module, broken, _full_disk)
    with pytest.raises(CheckpointError, match=f"phase '{phase}'.*\n  rank 0: OSError: .*No space left"):
        _save(tmp_path, 1)
    assert _names(tmp_path) == []


def _full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["write_text", "list_checkpoints", "shutil.rmtree"])
def test_what_fails_after_the_rename_is_warned_of_and_the_checkpoint_stands(
    tmp_path: Path, monkeypatch, caplog, broken: str
) -> None:
    _save(tmp_path, 1)
    monkeypatch.setattr(f"opensora_dist.checkpoint.commit.{broken}", _full_disk)
    with caplog.at_level("WARNING"):
        folder = _save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    assert "No space left" in caplog.text
    assert find_resumable(tmp_path).path == folder


def test_a_partial_folder_that_cant_be_removed_does_not_keep_saves_from_working(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "step-00000001.partial-0a1b").mkdir()
    monkeypatch.setattr(commit_module.shutil, "rmtree", _full_disk)
    with caplog.at_level("WARNING"):
        assert _value(_save(tmp_path, 2)) == 2.0
    assert "step-00000001.partial-0a1b, left by a save that died" in caplog.text


def test_a_checkpoint_known_to_be_damaged_takes_no_place_of_a_good_one(tmp_path: Path) -> None:
    for step in (300, 400, 500):
        _save(tmp_path, step)
    _flip(tmp_path / step_name(500))
    rejected = [r.path.name for r in find_resumable(tmp_path).rejected]
    assert rejected == [step_name(500)]
    _save(tmp_path, 600, keep_last=2, rejected=rejected)
    assert _names(tmp_path) == [LATEST_NAME, step_name(400), step_name(500), step_name(600)]
    _save(tmp_path, 700, keep_last=2, rejected=rejected)
    assert _names(tmp_path) == [LATEST_NAME, step_name(600), step_name(700)]


COMMIT_PHASES = [phase for phase in SAVE_PHASES if phase not in ("copy", "describe")]  # these are the caller's
KILL_POINTS = [
    "_stage",
    "save_tensors",
    "describe_files",
    "write_manifest",
    "fsync",
    "os.rename",
    "fsync of the root",
    "write_text",
    "rmtree",
]
KILLS = [(phase, "before") for phase in COMMIT_PHASES] + [(point, when) for point in KILL_POINTS for when in ("before", "after")]


@pytest.mark.parametrize("point, when", KILLS)
def test_killed_anywhere_something_whole_is_found_and_the_next_save_works(
    tmp_path: Path, monkeypatch, point: str, when: str
) -> None:
    _save(tmp_path, 1)

    def deadly(function, only=None):
        def call(*args, **kwargs):
            if only is not None and args[0] != only:
                return function(*args, **kwargs)
            if when == "after":
                function(*args, **kwargs)
            raise Killed

        return call

    if point == "save_tensors":
        monkeypatch.setattr(f"{__name__}.save_tensors", deadly(save_tensors))
    elif point == "os.rename":
        monkeypatch.setattr(commit_module.os, "rename", deadly(commit_module.os.rename))
    elif point == "rmtree":
        monkeypatch.setattr(commit_module.shutil, "rmtree", deadly(commit_module.shutil.rmtree))
    elif point == "fsync of the root":  # the one after the rename
        monkeypatch.setattr(commit_module, "fsync", deadly(commit_module.fsync, only=tmp_path))
    elif point not in COMMIT_PHASES:
        monkeypatch.setattr(commit_module, point, deadly(getattr(commit_module, point)))
    with pytest.raises(Killed):
        _save(tmp_path, 2, keep_last=1, on_phase=deadly(lambda _: None, only=point))
    monkeypatch.undo()
    found = find_resumable(tmp_path)
    assert _value(found.path) in (1.0, 2.0)
    assert found.rejected == ()
    assert all(verify(tmp_path / n) == [] for n in _names(tmp_path) if n.startswith("step-") and "partial" not in n)
    assert _value(_save(tmp_path, 3, keep_last=1)) == 3.0
    assert _names(tmp_path) == [LATEST_NAME, step_name(3)]


def test_every_phase_is_announced_once_in_order(tmp_path: Path) -> None:
    seen: list[str] = []
    _save(tmp_path, 1, on_phase=seen.append)
    assert seen == COMMIT_PHASES


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_replacing_a_step_is_atomic(tmp_path: Path, monkeypatch, renames: int) -> None:
    _save(tmp_path, 1, value=0.0)
    _save(tmp_path, 2, value=1.0)
    rename, done = commit_module.os.rename, []

    def deadly(*args):
        if len(done) == renames:
            raise Killed
        done.append(args)
        rename(*args)
        if len(done) == renames == 2:
            raise Killed

    monkeypatch.setattr(commit_module.os, "rename", deadly)
    with pytest.raises(Killed):
        _save(tmp_path, 2, value=2.0)
    monkeypatch.undo()
    assert _value(find_resumable(tmp_path).path) == (2.0 if renames == 2 else 1.0)
    assert _value(_save(tmp_path, 2, value=3.0)) == 3.0
    assert _names(tmp_path) == [LATEST_NAME, step_name(1), step_name(2)]


def _flip(folder: Path) -> None:
    (file,) = (folder / "model").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)


def _truncate(folder: Path) -> None:
    (file,) = (folder / "model").iterdir()
    file.write_bytes(file.read_bytes()[:-3])


DAMAGES = {
    "bit flip": _flip,
    "truncation": _truncate,
    "missing file": lambda folder: (folder / "trainer.json").unlink(),
    "missing folder": lambda folder: shutil.rmtree(folder / "model"),
    "extra file": lambda folder: (folder / "model" / "stray.safetensors").touch(),
    "missing manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_before_loading_and_the_previous_one_is_used(tmp_path: Path, damage) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    damage(tmp_path / step_name(2))
    found = find_resumable(tmp_path)
    assert found.path == tmp_path / step_name(1)
    assert found.rejected[0].path == tmp_path / step_name(2)
    assert found.rejected[0].problems
    assert resolve(tmp_path) == tmp_path / step_name(1)
    with pytest.raises(CheckpointError, match="does not verify"):
        resolve(tmp_path / step_name(2))


def test_resolve_takes_a_run_its_checkpoints_or_a_step(tmp_path: Path) -> None:
    folder = _save(tmp_path / "run" / "checkpoints", 7)
    assert resolve(tmp_path / "run") == resolve(tmp_path / "run" / "checkpoints") == resolve(folder) == folder


def test_resolve_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="none was saved yet"):
        resolve(tmp_path)
    (tmp_path / "step-00000001.partial-0a1b").mkdir()
    with pytest.raises(CheckpointError, match="saving was cut off"):
        resolve(tmp_path)
    _flip(_save(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint verifies.*content hash"):
        resolve(tmp_path)


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing in it is pickled"):
        commit(tmp_path, step=1, write=lambda p: torch.save({}, p / "state.pt"), metadata={}, keep_last=1)
    assert find_resumable(tmp_path).path is None


def test_an_absent_root_has_nothing_to_resume_from(tmp_path: Path) -> None:
    found = find_resumable(tmp_path / "checkpoints")
    assert (found.path, found.rejected) == (None, ())
