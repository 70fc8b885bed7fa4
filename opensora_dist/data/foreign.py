"""WebDataset tars that others made: read once, and indexed like our own. After that no header is parsed and nothing is decoded.

What is understood is a short list: .npy, .safetensors, .json and .txt. Anything else is passed over and counted; what a reader would have
to run (.pickle, .pth, object arrays, ...) is refused. Members are grouped as webdataset does: the key is a name up to the first dot of
its last part.
"""

# t C h w latent frames, channels, height, width; Y text tokens, E text width

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import Field, ValidationError

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import parse_yaml
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import DTYPES, SampleRow
from opensora_dist.core.tar import Member, scan_tar, split_name
from opensora_dist.core.types import Thw
from opensora_dist.data.arrays import ArrayPlace, UnfitError, npy_place, read_exactly, safetensors_places

LAYOUT_NAME = "dataset.yaml"
_CODE = ("pyd", "pyc", "so", "pickle", "pkl", "pth", "pt", "joblib", "dill")
_MASKS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
_LATENTS = ("latents.npy", "npy")
_LONGEST_TEXT = 1 << 20
_LONGEST_SIDE = 1 << 20
_OTHER_CLIP = "clip in .json that does not fit its latents"


class Layout(DatasetSpec):
    """What foreign tars hold: their ``dataset.yaml``."""

    buckets: tuple[tuple[int, int, int], ...] = Field((), description="Not needed: counted.")
    axes: Literal["TCHW", "CTHW"] = Field(
        "TCHW", description="Order of a latents array's axes; CTHW is read for single frames only."
    )

    def clip_of(self, latent: Thw) -> Thw:
        """The clip in pixels that latents are of, by the codec's factors."""
        frames = 1 if latent.t == 1 else latent.t * self.temporal_factor
        return Thw(frames, latent.h * self.spatial_factor, latent.w * self.spatial_factor)


@dataclass
class Findings:
    """What one tar holds.

    Args:
        rows: Its samples.
        dropped: Why samples were left out, to their keys.
        ignored: Endings that mean nothing here, to how many members have them.
    """

    rows: list[SampleRow] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": [asdict(row) for row in self.rows], "dropped": self.dropped, "ignored": self.ignored}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Findings:
        """The inverse of ``to_json``."""
        rows = [SampleRow(**(row | {"latents_frame_xxh3": tuple(row["latents_frame_xxh3"])})) for row in value["rows"]]
        return cls(rows=rows, dropped=value["dropped"], ignored=value["ignored"])


def parse_layout(text: str, *, shown: str) -> Layout:
    """Reads a ``dataset.yaml``.

    Raises:
        ConfigError: Every field that is missing, unknown or wrong.
    """
    raw = parse_yaml(text, source=shown)
    try:
        layout = Layout.model_validate(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigError([f"{p}; docs/remote.md shows a whole file" for p in problems], source=shown) from error
    if not (len(layout.latent_mean) == len(layout.latent_std) == layout.channels and min(layout.latent_std) > 0):
        raise ConfigError(
            f"latent_mean and latent_std must hold channels={layout.channels} values each, all of latent_std above 0",
            source=shown,
        )
    return layout


def index_tar(fd: int, *, name: str, shown: str, layout: Layout, beat: Callable[[], None] = lambda: None) -> Findings:
    """Reads a tar from end to end once: where its samples' arrays lie, and their hashes.

    Args:
        name: What the index calls the shard; samples' keys begin with it, as other tars may use the same ones.
        beat: Called after each sample.
    Raises:
        DataError: The tar is damaged (file and offset), or holds code, or frames that don't lie one after another.
    """
    found, seen = Findings(), set[str]()
    for key, members in _samples(scan_tar(fd, shown=shown), found):
        beat()
        for suffix in members:
            if (ending := suffix.rpartition(".")[2].lower()) in _CODE:
                raise DataError(
                    f"{shown}: member {key}.{suffix} is code to whoever loads it (.{ending}), so this tar is not read; store arrays as .npy "
                    "or .safetensors and pack it again"
                )
        try:
            if key in seen:
                raise UnfitError("its key comes twice in its shard")
            seen.add(key)
            found.rows.append(_sample(fd, key, members, found, name=name, shown=shown, layout=layout))
        except UnfitError as error:
            found.dropped.setdefault(str(error), []).append(f"{name}: {key}")
    return found


def _samples(members: Iterator[Member], found: Findings) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members that follow each other and share a key, by the rest of their names."""

    def keyed() -> Iterator[tuple[str, str, Member]]:
        for member in members:
            if (parts := split_name(member.name)) is None:
                found.ignored["no key"] = found.ignored.get("no key", 0) + 1
                continue
            yield *parts, member

    for key, group in groupby(keyed(), key=lambda entry: entry[0]):
        mine = {suffix: member for _, suffix, member in group}
        for suffix in mine:
            if suffix.rpartition(".")[2].lower() not in ("npy", "safetensors", "json", "txt", *_CODE):
                found.ignored[f".{suffix}"] = found.ignored.get(f".{suffix}", 0) + 1
        yield key, mine


def _sample(
    fd: int, key: str, members: dict[str, Member], found: Findings, *, name: str, shown: str, layout: Layout
) -> SampleRow:
    arrays = _arrays(fd, members, shown=f"{shown}: {key}")
    latents, text = arrays.get("latents"), arrays.get("text")
    if latents is None:
        raise UnfitError("it has no latents (latents.npy, npy, or `latents` in a safetensors)")
    if text is None:
        raise UnfitError("it has no text vectors (text.npy, or `text` or `text_embeds` in a safetensors)")
    t, h, w = _latent_shape(latents, layout, shown=shown)
    tokens = _tokens(fd, text, arrays.get("text_mask"), layout)
    for what, array in (("latents", latents), ("text", text)):
        if array.dtype not in DTYPES:
            raise UnfitError(f"its {what} are {array.dtype}; {' and '.join(DTYPES)} are read")
    if latents.dtype != text.dtype:
        raise UnfitError(f"its latents are {latents.dtype} and its text {text.dtype}; both must be of one precision")
    about = _about(fd, members)
    clip = _clip(about, Thw(t, h, w), layout)
    if clip is None:
        clip = layout.clip_of(Thw(t, h, w))
        found.ignored[_OTHER_CLIP] = found.ignored.get(_OTHER_CLIP, 0) + 1
    text_bytes = tokens * layout.text_width * np.dtype(text.dtype).itemsize
    frames = memoryview(read_exactly(fd, latents.offset, latents.num_bytes))
    size = latents.num_bytes // t
    return SampleRow(
        key=f"{name.removesuffix('.tar')}/{key}",
        shard=name,
        latents_offset=latents.offset,
        latents_bytes=latents.num_bytes,
        latents_frame_xxh3=tuple(xxhash.xxh3_64_intdigest(frames[i * size : (i + 1) * size]) for i in range(t)),
        text_offset=text.offset,
        text_bytes=text_bytes,
        text_xxh3=xxhash.xxh3_64_intdigest(read_exactly(fd, text.offset, text_bytes)),
        dtype=latents.dtype,
        latent_t=t,
        latent_h=h,
        latent_w=w,
        clip_t=clip.t,
        clip_h=clip.h,
        clip_w=clip.w,
        text_tokens=tokens,
        caption=_first_text(about, "caption", "text"),
        source=_first_text(about, "source", "url") or f"{name}: {key}",
    )


def _arrays(fd: int, members: dict[str, Member], *, shown: str) -> dict[str, ArrayPlace]:
    """``latents``, ``text`` and ``text_mask``, as far as a sample has them, in whichever file."""
    found: dict[str, ArrayPlace] = {}
    for suffix, member in members.items():
        if suffix.endswith("safetensors"):
            found |= safetensors_places(fd, member)
    if "text_embeds" in found:
        found.setdefault("text", found["text_embeds"])
    wanted = {"text.npy": "text", "text_mask.npy": "text_mask"} | {name: "latents" for name in reversed(_LATENTS)}
    for suffix in sorted(members, key=lambda s: s in _LATENTS[:1]):  # latents.npy is more to the point than npy
        if suffix.endswith("npy"):
            place = npy_place(fd, members[suffix], shown=shown)  # of every .npy: one that holds objects is code wherever it is
            if suffix in wanted:
                found[wanted[suffix]] = place
    return found


def _latent_shape(latents: ArrayPlace, layout: Layout, *, shown: str) -> tuple[int, int, int]:
    """Frames, height and width."""
    shape = latents.shape[1:] if len(latents.shape) == 5 and latents.shape[0] == 1 else latents.shape
    if len(shape) == 3:  # an image without a time axis
        shape = (1, *shape) if layout.axes == "TCHW" else (shape[0], 1, *shape[1:])
    if len(shape) != 4 or min(shape) < 1:
        raise UnfitError(f"its latents have {len(latents.shape)} axes; {layout.axes} has 4")
    if layout.axes == "CTHW":
        if shape[1] > 1:
            raise DataError(
                f"{shown}: latents are stored [C, T, h, w], so that no frame can be read by itself; store them frames first "
                "(`latents.transpose(1, 0, 2, 3)`): docs/remote.md has the lines that turn a tar around"
            )
        shape = (1, shape[0], *shape[2:])
    if shape[1] != layout.channels:
        raise UnfitError(f"its latents have {shape[1]} channels, dataset.yaml says {layout.channels}")
    return shape[0], shape[2], shape[3]


def _tokens(fd: int, text: ArrayPlace, mask: ArrayPlace | None, layout: Layout) -> int:
    """Valid tokens, which must be the first ones."""
    shape = text.shape[1:] if len(text.shape) == 3 and text.shape[0] == 1 else text.shape
    if len(shape) != 2 or shape[1] != layout.text_width:
        raise UnfitError(f"its text is {list(text.shape)}, not [tokens, {layout.text_width}]")
    tokens = int(shape[0])
    if mask is not None:
        if mask.dtype not in _MASKS:
            raise UnfitError(f"its text_mask is {mask.dtype}; integers, bool and float16 to 64 are read")
        raw = np.frombuffer(read_exactly(fd, mask.offset, mask.num_bytes), mask.dtype) != 0
        if raw.size != tokens:
            raise UnfitError(f"its text_mask has {raw.size} values for {tokens} tokens")
        tokens = int(raw.sum())
        if not raw[:tokens].all():
            raise UnfitError("its text_mask has gaps; valid tokens must come first")
    if not 1 <= tokens <= layout.max_tokens:
        raise UnfitError(f"it has {tokens} text tokens; 1 to max_tokens={layout.max_tokens} are read")
    return tokens


def _about(fd: int, members: dict[str, Member]) -> dict[str, Any]:
    """What .json and .txt say; a caption in a .txt comes first."""
    about: dict[str, Any] = {}
    for suffix, member in members.items():
        if suffix not in ("json", "txt"):
            continue
        if member.size > _LONGEST_TEXT:
            raise UnfitError(f"its .{suffix} is larger than {_LONGEST_TEXT:,} bytes")
        try:
            content = read_exactly(fd, member.offset, member.size).decode()
            told = {"caption": content.strip()} if suffix == "txt" else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnfitError(f"its .{suffix} can't be read") from error
        if isinstance(told, dict):
            about |= told if suffix == "txt" else told | about
    return about


def _first_text(about: dict[str, Any], *names: str) -> str:
    found = next((about[name] for name in names if isinstance(about.get(name), str)), "")
    return found.encode(errors="replace").decode()  # JSON may hold halves of characters


def _clip(about: dict[str, Any], latent: Thw, layout: Layout) -> Thw | None:
    """The clip in pixels: as the .json says (`clip`: [T, H, W]), or by the codec's factors. None where it says what can't be.

    Codecs round up or down, and some keep a frame more: by less than one latent in each axis.
    """
    said, usual = about.get("clip"), layout.clip_of(latent)
    if not (isinstance(said, list) and len(said) == 3 and all(isinstance(n, int) and 0 < n < _LONGEST_SIDE for n in said)):
        return usual
    factors = (layout.temporal_factor, layout.spatial_factor, layout.spatial_factor)
    sides = zip(said, (latent.t, latent.h, latent.w), factors, strict=True)
    return Thw(*said) if all(abs(n - side * factor) < factor for n, side, factor in sides) else None


def settle_clips(rows: Sequence[SampleRow], layout: Layout) -> tuple[list[SampleRow], int]:
    """Gives every clip shape one latent shape, as batches need: where a stated clip stands for two, its samples get it by the factors.

    Returns:
        The samples, and how many of them were changed.
    """
    stated = [row.shape for row in rows]
    shapes = stated
    while True:  # ends, as clips by the factors differ where latents do: each round has more of them
        latents: dict[Thw, set[Thw]] = {}
        for shape in set(shapes):
            latents.setdefault(shape.clip, set()).add(shape.latent)
        usual = {s: replace(s, clip=layout.clip_of(s.latent)) for s in set(shapes) if len(latents[s.clip]) > 1}
        if not usual:
            break
        shapes = [usual.get(shape, shape) for shape in shapes]
    changed = [old != new for old, new in zip(stated, shapes, strict=True)]
    settled = [
        replace(row, clip_t=shape.clip.t, clip_h=shape.clip.h, clip_w=shape.clip.w) if anew else row
        for row, shape, anew in zip(rows, shapes, changed, strict=True)
    ]
    return settled, sum(changed)
