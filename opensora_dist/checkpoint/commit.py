"""The commit protocol: a checkpoint is published whole or it does not exist.

    step-00000500.partial-1f2e3d4c/   every rank writes here
    step-00000500.replaced-1f2e3d4c/  an older step-00000500, for the moment between two renames
    step-00000500/                    committed: MANIFEST.json was written last, then the folder was renamed
    latest                            a text file naming the newest commit, moved after the rename

Killed at any point, the folder holds every earlier checkpoint, and perhaps the new one: a ``.partial`` folder is never looked at,
and the next commit removes it. A checkpoint that is pruned becomes one before its files go.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from opensora_dist.checkpoint.manifest import MANIFEST_NAME, FileEntry, describe_files, list_files, verify, write_manifest
from opensora_dist.core.errors import CheckpointError
from opensora_dist.core.io import fsync, write_text
from opensora_dist.core.layout import CHECKPOINTS_DIR
from opensora_dist.core.logging import get_logger
from opensora_dist.parallel.gather import gather_text

LATEST_NAME = "latest"

SAVE_PHASES = (
    "copy",  # the state is taken; where the save is asynchronous, training goes on after it
    "stage",  # the partial folder is made
    "write",  # tensors
    "describe",  # config, data set, trainer state
    "list",  # what is there
    "hash",
    "manifest",
    "flush",  # everything to the disk
    "replace",  # an older checkpoint of this step steps aside
    "publish",  # the rename
    "latest",
    "prune",  # older ones lose their names
    "remove",  # and their files
)
"""What a save does, in this order. Every rank passes every phase; from ``manifest`` on the first rank acts alone."""

_COMMITTED = re.compile(r"step-(\d+)(\.replaced-[0-9a-f]+)?")
_PARTIAL = re.compile(r"step-\d+\.partial-[0-9a-f]+")
_BREAK = "\n"  # between the phase and what is wrong
_log = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A checkpoint that can't be used, and why."""

    path: Path
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """What there is to resume from.

    Args:
        path: The newest checkpoint that verifies; None where there is none.
        rejected: Newer ones that were passed over.
    """

    path: Path | None
    rejected: tuple[Rejected, ...]


def step_name(step: int) -> str:
    """The folder name of a step: ``step-00000500``."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a committed folder."""
    match = _COMMITTED.fullmatch(Path(folder).name)
    assert match, f"{folder} is no step folder"
    return int(match[1])


def commit(
    root: Path,
    *,
    step: int,
    write: Callable[[Path], None],
    metadata: Mapping[str, Any],
    keep_last: int,
    group: dist.ProcessGroup | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
    rejected: Collection[str] = (),
) -> Path:
    """Publishes one checkpoint. Collective over ``group`` if torch.distributed is initialised: every rank calls it.

    Args:
        root: The run's ``checkpoints`` folder, on a file system that all ranks share.
        step: Optimizer steps done. An existing checkpoint of this step is replaced.
        write: Puts this rank's files into the folder it is given; called on every rank, and may hold collectives of its own.
        metadata: Goes into the manifest: ``config_hash``, ``layout``, ...; JSON values.
        keep_last: Checkpoints kept, this one included. Newer steps (which a resume must have rejected) are left alone.
        group: Ranks that take part; its backend must take CPU tensors (gloo). None is all ranks.
        on_phase: Called on every rank at the start of each of ``SAVE_PHASES`` but for ``copy`` and ``describe``, the caller's own.
        rejected: Names of folders known to be damaged, which don't count as kept.
    Returns:
        The committed folder.
    Raises:
        CheckpointError: On every rank, naming the ranks that failed and why. Older checkpoints are as they were.
    """
    root = Path(root)
    final = root / step_name(step)
    commit_id = gather_text(uuid.uuid4().hex[:8], group=group)[0]
    partial = root / f"{final.name}.partial-{commit_id}"
    lead = _rank(group) == 0

    def together(phase: str, action: Callable[[], T]) -> T:
        on_phase(phase)
        return _together(phase, action, group)

    try:
        # Every rank enters every phase below, whatever happened to it: each one ends in a collective that shares the outcome.
        together("stage", lambda: _stage(partial) if lead else None)
        together("write", lambda: write(partial))
        listing = together("list", lambda: list_files(partial) if lead else [])
        names: list[str] = json.loads(gather_text(json.dumps(listing), group=group)[0])
        mine = together("hash", lambda: describe_files(partial, names[_rank(group) :: _world(group)]))
        shares = gather_text(json.dumps({name: asdict(entry) for name, entry in mine.items()}), group=group)
        files = {name: FileEntry(**entry) for share in shares for name, entry in json.loads(share).items()}
        steps = _publish_steps(partial, final, step, metadata, files)
        # One collective for all of these: a rank that dies now must not keep the first one from the end of what is written already.
        _together("publish", lambda: _in_turn(steps, lead=lead, on_phase=on_phase), group)
    except CheckpointError:
        # All ranks are past the failed phase, so nobody still writes here. What can't be removed now, the next commit removes.
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _in_turn(_prune_steps(root, committed=final, keep_last=keep_last, rejected=rejected), lead=lead, on_phase=on_phase)
    return final


def find_resumable(root: Path, *, group: dist.ProcessGroup | None = None) -> Resumable:
    """The newest checkpoint that verifies. Collective if torch.distributed is initialised: each rank reads its share of the files.

    Args:
        root: A ``checkpoints`` folder; may be absent.
        group: As in ``commit``.
    """
    root, share = Path(root), slice(_rank(group), None, _world(group))
    listed = _together("verify", lambda: [p.name for p in list_checkpoints(root)] if _rank(group) == 0 else [], group)

    def problems_of(folder: Path) -> list[str]:
        mine = _together("verify", lambda: verify(folder, share=share), group)
        return list(dict.fromkeys(p for said in gather_text(json.dumps(mine), group=group) for p in json.loads(said)))

    return _first_whole([root / name for name in json.loads(gather_text(json.dumps(listed), group=group)[0])], problems_of)


def resolve(path: Path) -> Path:
    """The checkpoint that a user means by a run directory, its ``checkpoints`` folder, or a step folder. Not collective.

    Raises:
        CheckpointError: Nothing is there, or nothing that verifies; the message says what was found instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; give a run directory, its {CHECKPOINTS_DIR}/ folder, or one step-N folder in it"
        )
    if (path / MANIFEST_NAME).is_file() or _COMMITTED.fullmatch(path.name):
        if problems := verify(path):
            raise CheckpointError(f"{path} does not verify, use an older step-N beside it:\n" + _indent(problems))
        return path
    root = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    found = _first_whole(list_checkpoints(root), verify)
    if found.path is None and found.rejected:
        lines = [f"{r.path.name}: {problem}" for r in found.rejected for problem in r.problems]
        raise CheckpointError(f"{root}: no checkpoint verifies; restore one from a copy, or train again:\n" + _indent(lines))
    if found.path is None:
        why = "only one whose saving was cut off" if unfinished_saves(root) else "none was saved yet"
        raise CheckpointError(f"{root}: no checkpoint ({why}); give a run that reached checkpoint.every_steps or its last step")
    for r in found.rejected:
        _log.warning("%s does not verify (%s); using %s", r.path, "; ".join(r.problems), found.path.name)
    return found.path


def _first_whole(folders: Sequence[Path], problems_of: Callable[[Path], list[str]]) -> Resumable:
    rejected: list[Rejected] = []
    for folder in folders:
        problems = problems_of(folder)
        if not problems:
            return Resumable(path=folder, rejected=tuple(rejected))
        rejected.append(Rejected(path=folder, problems=tuple(problems)))
    return Resumable(path=None, rejected=tuple(rejected))


def list_checkpoints(root: Path) -> list[Path]:
    """Step folders, verified or not, newest first; of one step, the one in place before the one it replaced."""
    if not root.is_dir():
        return []
    folders = [p for p in root.iterdir() if p.is_dir() and _COMMITTED.fullmatch(p.name)]
    return sorted(folders, key=lambda p: (-step_of(p), p.name))


def last_step(root: Path) -> int:
    """Of the checkpoint that was committed last, which need not be the newest one: a run may have gone back. 0 where there is none."""
    try:
        return int((root / LATEST_NAME).read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def unfinished_saves(root: Path) -> int:
    """How many saves left a partial folder."""
    return sum(bool(_PARTIAL.fullmatch(p.name)) for p in Path(root).iterdir())


def _stage(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for entry in partial.parent.iterdir():
        if _PARTIAL.fullmatch(entry.name):  # of a save that died: one run has one writer, so it can't be alive
            with _goes_on(f"can't remove {entry}, left by a save that died"):
                shutil.rmtree(entry)
    partial.mkdir()


class _Failed(CheckpointError):
    """What one of several phases that share a collective raised, its cause; ``phase`` says which."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


def _in_turn(steps: Mapping[str, Callable[[], None]], *, lead: bool, on_phase: Callable[[str], None]) -> None:
    """Phases that the first rank goes through alone, the others by name."""
    for phase, act in steps.items():
        on_phase(phase)
        if lead:
            try:
                act()
            except Exception as error:
                raise _Failed(phase) from error


def _publish_steps(
    partial: Path, final: Path, step: int, metadata: Mapping[str, Any], files: Mapping[str, FileEntry]
) -> dict[str, Callable[[], None]]:
    def manifest() -> None:
        write_manifest(partial, step=step, metadata=metadata, files=files)

    def flush() -> None:
        for name in files:
            fsync(partial / name)
        for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
            fsync(folder)

    def replace() -> None:
        # A folder can't be renamed over another, so the old one steps aside; ``find_resumable`` knows its name.
        if final.exists():
            os.rename(final, final.with_name(partial.name.replace(".partial-", ".replaced-")))

    def publish() -> None:
        os.rename(partial, final)
        fsync(final.parent)

    def latest() -> None:
        with _goes_on(f"{final} is committed, but {LATEST_NAME} can't be moved to it, which nothing is loaded by"):
            write_text(final.parent / LATEST_NAME, final.name + "\n")

    return {"manifest": manifest, "flush": flush, "replace": replace, "publish": publish, "latest": latest}


def _prune_steps(root: Path, *, committed: Path, keep_last: int, rejected: Collection[str]) -> dict[str, Callable[[], None]]:
    """Removes what the checkpoint just committed, which was hashed a moment ago, makes superfluous.

    A folder loses its name before its files: killed in between, it is a partial one, not a damaged checkpoint.
    """
    doomed: list[Path] = []

    def superfluous() -> Iterator[Path]:
        kept = 1
        for folder in list_checkpoints(root):
            if step_of(folder) == step_of(committed) and folder != committed:
                yield folder  # it was replaced
            elif step_of(folder) < step_of(committed):
                if kept >= keep_last:
                    yield folder
                kept += folder.name not in rejected

    def prune() -> None:
        with _goes_on(f"can't look for old checkpoints in {root}"):
            for folder in superfluous():
                nameless = root / f"{step_name(step_of(folder))}.partial-{uuid.uuid4().hex[:8]}"
                with _goes_on(f"can't remove the old checkpoint {folder}"):
                    os.rename(folder, nameless)
                    doomed.append(nameless)

    def remove() -> None:
        for folder in doomed:
            with _goes_on(f"can't remove the old checkpoint {folder}"):
                shutil.rmtree(folder)

    return {"prune": prune, "remove": remove}


@contextmanager
def _goes_on(said: str) -> Iterator[None]:
    """What fails here takes nothing from a checkpoint; a full disk will show itself at the next commit."""
    try:
        yield
    except OSError as error:
        _log.warning("%s (%s); see to it by hand", said, error)


def _together(phase: str, action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Runs ``action`` and tells all ranks how it went, so that either all go on or all raise."""
    result: T | None = None
    failure = ""
    cause: BaseException | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must learn of it; it is raised below
        cause = error
        if isinstance(error, _Failed):
            phase, cause = error.phase, error.__cause__
        failure = phase + _BREAK + (str(cause) if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: {cause}")
    failures = gather_text(failure, group=group)
    if any(failures):
        ranks_of = {f: [str(rank) for rank, g in enumerate(failures) if g == f] for f in failures if f}
        lines = [f"rank {', '.join(ranks)}: {f.partition(_BREAK)[2]}" for f, ranks in ranks_of.items()]
        phase = next(iter(ranks_of)).partition(_BREAK)[0]
        raise CheckpointError(
            f"checkpoint failed in phase '{phase}'; older checkpoints are untouched:\n" + _indent(lines)
        ) from cause
    return result  # type: ignore[return-value]  # no failure anywhere, so ``action`` returned


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _indent(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"  {line}" for line in lines)
