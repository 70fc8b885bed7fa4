"""What tells replaced weights from the same ones."""

from __future__ import annotations

from opensora_dist.config.load import expand
from opensora_dist.prepare.store import address


def fingerprint(path: str | None) -> str | None:
    """Of a local file or folder, a hash of its files' names, sizes and times of change; of a hub's name, the name; None of None.

    Where the files lie is left out: a folder that was moved is the same one. Hidden files are, too: hubs' clients keep locks there.
    """
    if path is None:
        return None
    place = expand(path)
    if not place.exists():
        return path
    inside = [place] if place.is_file() else place.rglob("*")
    names = {"" if one == place else one.relative_to(place).as_posix(): one for one in inside if one.is_file()}
    stats = {name: one.stat() for name, one in names.items() if not any(part.startswith(".") for part in name.split("/"))}
    return address("files", [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())])
