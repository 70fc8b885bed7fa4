"""Where bytes of remote shards come from: URLs through fsspec, and commands whose output is a shard.

Credentials are those that the stores' own libraries read from the environment; nothing here takes, keeps or shows any.
"""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.extras import missing_extra, require_extra
from opensora_dist.core.io import hash_bytes
from opensora_dist.core.urls import PIPE, from_environment, pipe_arguments, plain_name, redact

_PIECE_BYTES = 8 << 20
_CONNECT_S = 30.0
_SILENCE_S = 60.0  # a transfer without a byte for so long has failed
_VERSION_FIELDS = ("size", "ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class Origin(Protocol):
    """One remote file."""

    @property
    def shown(self) -> str:
        """What messages call it."""

    def read(self, start: int) -> Iterator[bytes]:
        """Its bytes from ``start`` on, in pieces. Raises what the transport raises (``data.transport.transport_errors``)."""

    def version(self) -> str | None:
        """Something that changes with its content, where that can be had without reading it."""


@dataclass(frozen=True)
class UrlOrigin:
    """A file of any store that fsspec knows. ``url`` may hold ``$NAME``; it is filled in when the store is asked."""

    url: str

    @property
    def shown(self) -> str:
        return redact(self.url)

    def read(self, start: int) -> Iterator[bytes]:
        fs, path = file_system(self.url)
        if self.url.startswith("http"):
            yield from _read_http(fs, path, start)
            return
        with fs.open(path, "rb", block_size=_PIECE_BYTES, cache_type="none") as file:
            file.seek(start)
            size = file.size if isinstance(getattr(file, "size", None), int) else None
            while piece := file.read(_PIECE_BYTES):
                yield piece
                start += len(piece)
        if size is not None and start != size:
            raise EOFError(f"{start:,} bytes came, the store says {size:,}")

    def version(self) -> str | None:
        fs, path = file_system(self.url)
        info = fs.info(path)
        known = {name: str(info[name]) for name in _VERSION_FIELDS if info.get(name) is not None}
        return hash_bytes(json.dumps(known, sort_keys=True).encode()) if known else None


@dataclass(frozen=True)
class PipeOrigin:
    """The output of a command, which is run without a shell. ``name`` takes the place of ``{}``."""

    command: str
    name: str = "{}"

    @property
    def shown(self) -> str:
        return redact(self.command).replace("{}", self.name)

    def read(self, start: int) -> Iterator[bytes]:
        with tempfile.TemporaryFile() as said:
            words = pipe_arguments(self.command, name=self.name)
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, bufsize=0)
            assert process.stdout is not None
            try:
                while piece := self._piece(process):
                    yield piece[start:]  # a command begins at the beginning
                    start = max(0, start - len(piece))
                if (code := process.wait(_SILENCE_S)) != 0:
                    said.seek(0)
                    last = said.read()[-500:].decode(errors="replace").strip().rpartition("\n")[2]
                    raise EOFError(f"the command ended with code {code}: {redact(last)}")
            finally:
                process.kill()
                process.wait()
                process.stdout.close()

    def version(self) -> str | None:
        return None

    @staticmethod
    def _piece(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], _SILENCE_S)[0]:
            raise TimeoutError(f"the command wrote nothing for {_SILENCE_S:.0f} s")
        return process.stdout.read(1 << 20) or b""


def origin_of(url: str) -> Origin:
    """The origin of one file."""
    return PipeOrigin(url) if url.startswith(PIPE) else UrlOrigin(url)


def origin_in(folder_url: str, name: str) -> Origin:
    """The origin of a file of a data set that was made elsewhere, as was its name.

    Raises:
        DataError: A name that could mean something else to a store or a command.
    """
    plain_name(name, where=redact(folder_url))
    return PipeOrigin(folder_url, name) if folder_url.startswith(PIPE) else UrlOrigin(child(folder_url, name))


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        ConfigError: A package is missing, or the scheme is not one that fsspec knows.
    """
    scheme = url.partition("://")[0]
    require_extra("fsspec", extra="remote", wanted_by=f"data at {scheme}://")
    if (package := _PACKAGES.get(scheme)) and (said := missing_extra(package, extra="remote", wanted_by=f"data at {scheme}://")):
        raise ConfigError(said)
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(from_environment(url))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{redact(url)}: fsspec can't open {scheme}:// ({redact(str(error))})") from error
    return fs, str(path)


def child(folder_url: str, name: str) -> str:
    """The URL of a file in a folder; a query string stays at the end."""
    path, question, query = folder_url.partition("?")
    return f"{path.rstrip('/')}/{name}{question}{query}"


def _read_http(fs: Any, path: str, start: int) -> Iterator[bytes]:
    """One request for the whole rest; servers that know no ranges send all, and what was had is skipped."""
    import aiohttp

    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    patience = aiohttp.ClientTimeout(total=None, connect=_CONNECT_S, sock_read=_SILENCE_S)
    with fs.open(path, "rb", block_size=0, size=-1, headers=headers, timeout=patience) as file:
        skip = start if file.r.status != 206 else 0
        while piece := file.read(_PIECE_BYTES):
            yield piece[skip:]
            skip = max(0, skip - len(piece))
