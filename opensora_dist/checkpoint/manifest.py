"""``MANIFEST.json``: what a checkpoint holds, so that damage is found before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opensora_dist.core.errors import CheckpointError
from opensora_dist.core.io import hash_bytes, hash_file, read_json, write_json

MANIFEST_NAME = "MANIFEST.json"
SCHEMA_VERSION = 2
_OWN_HASH = "xxh3"

# Law 8: tensors are safetensors, everything else is text. A file of another kind is a mistake of ours, found while saving.
ALLOWED_SUFFIXES = (".safetensors", ".json", ".yaml")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and xxh3-64 (hex) of one file."""

    num_bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``MANIFEST.json``.

    Args:
        step: Optimizer steps done.
        created: ISO 8601, UTC.
        metadata: What the writer says of the run: ``config_hash``, ``layout`` (world size, ZeRO stage), ...; JSON values.
        files: Path relative to the checkpoint, with forward slashes, to its entry.
        schema_version: Of this file.
    """

    step: int
    created: str
    metadata: dict[str, Any]
    files: dict[str, FileEntry]
    schema_version: int = SCHEMA_VERSION


def list_files(folder: Path) -> list[str]:
    """Every file below ``folder`` except the manifest: relative paths with forward slashes, sorted."""
    folder = Path(folder)
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(p for p in paths if p != MANIFEST_NAME)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Sizes and hashes of the named files.

    Raises:
        CheckpointError: A file is neither safetensors nor text, which could only be read by unpickling it.
    """
    entries: dict[str, FileEntry] = {}
    for name in names:
        path = Path(folder) / name
        if path.suffix not in ALLOWED_SUFFIXES:
            raise CheckpointError(
                f"{name}: a checkpoint holds {', '.join(ALLOWED_SUFFIXES)} files only; nothing in it is pickled"
            )
        entries[name] = FileEntry(num_bytes=path.stat().st_size, xxh3=hash_file(path))
    return entries


def write_manifest(folder: Path, *, step: int, metadata: Mapping[str, Any], files: Mapping[str, FileEntry]) -> Manifest:
    """Writes ``MANIFEST.json`` atomically; it is the last file of a checkpoint."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(step=step, created=created, metadata=dict(metadata), files=dict(files))
    content = asdict(manifest)
    write_json(Path(folder) / MANIFEST_NAME, content | {_OWN_HASH: _hash(content)})
    return manifest


def _hash(content: dict[str, Any]) -> str:
    """Of what the manifest says, whatever the spaces between."""
    return hash_bytes(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads ``MANIFEST.json``; says nothing about the files it names.

    Raises:
        CheckpointError: It is missing, damaged, or of another schema version.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so this folder was never committed; use another checkpoint") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema version {version}, this release reads {SCHEMA_VERSION}; use the release that wrote it"
        )
    if raw.pop(_OWN_HASH, None) != _hash(raw):
        raise CheckpointError(f"{path}: damaged (its own hash is another); use another checkpoint")
    try:
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        return Manifest(**raw)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error


def verify(folder: Path, *, share: slice = slice(None)) -> list[str]:
    """Compares a checkpoint with its manifest, reading every byte.

    Args:
        share: Files, in the order of their names, whose contents are read; names and sizes are compared of all.
    Returns:
        One sentence per problem (missing, extra, wrong size, wrong hash); empty for a whole checkpoint.
    """
    return _compare(Path(folder), share)


def compare_sizes(folder: Path) -> list[str]:
    """As ``verify``, but for contents: names and sizes alone, which takes no time."""
    return _compare(Path(folder), slice(0))


def _compare(folder: Path, share: slice) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    present = list_files(folder)
    read = set(sorted(manifest.files)[share])
    for name, entry in sorted(manifest.files.items()):
        if name not in present:
            problems.append(f"{name}: missing")
            continue
        try:
            num_bytes = (folder / name).stat().st_size
            if num_bytes != entry.num_bytes:
                problems.append(f"{name}: {num_bytes} bytes, the manifest says {entry.num_bytes}")
            elif name in read and (problem := _content_problem(folder / name, entry)):
                problems.append(f"{name}: {problem}")
        except OSError as error:
            problems.append(f"{name}: can't be read ({error})")
    return problems + [f"{name}: not in the manifest" for name in present if name not in manifest.files]


def _content_problem(path: Path, entry: FileEntry) -> str | None:
    digest = hash_file(path)
    return None if digest == entry.xxh3 else f"content hash {digest}, the manifest says {entry.xxh3}"
