"""Writing a folder of toy clips: H.264 files, captions and ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.io import atomic_path, read_json, write_json
from opensora_dist.core.video import write_video
from opensora_dist.parallel.keys import Keys
from opensora_dist.prepare.toy.render import ToyClip, ToyOptions, plan_clip, render

METADATA_NAME = "metadata.parquet"
RECIPE_NAME = "toy.json"

_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("text", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps", pa.float64()),
        ("size", pa.string()),
        ("colour", pa.string()),
        ("shape", pa.string()),
        ("moves", pa.list_(pa.string())),
        ("scale_px", pa.float64()),
        ("centres_px", pa.list_(pa.list_(pa.float64(), 2))),
        ("background", pa.string()),
        ("seed", pa.int64()),
        ("index", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ToyReport:
    """What ``generate`` did: the caption table's path, clips rendered now, and clips that were there already."""

    metadata: Path
    rendered: int
    kept: int


def generate(
    out: Path,
    *,
    clips: int,
    seed: int,
    options: ToyOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ToyReport:
    """Writes toy clips ``0 .. clips-1`` of one seed, with captions and truth in ``metadata.parquet``.

    Clip i depends on seed, i and options alone, so a second call renders only what is missing: it resumes a call that was cut
    off, and asking for more clips adds to a set. The caption table comes last; a folder that has one is whole.

    Args:
        out: A folder of its own; made if absent.
        clips: How many clips the caption table lists.
        seed: Chooses the clips.
        options: Frame sizes, lengths and looks.
        on_progress: Called with (clips done, clips in all).
    Raises:
        ConfigError: ``clips`` is not positive, or the folder holds something else: other files, or toy clips of another recipe.
    """
    options = options or ToyOptions()
    if clips < 1:
        raise ConfigError(f"clips={clips} must be at least 1")
    out = Path(out)
    _claim(out, recipe={"seed": seed, "options": _plain(asdict(options))})
    keys = Keys(seed)
    rows: list[dict[str, Any]] = []
    rendered = 0
    for index in range(clips):
        clip = plan_clip(index, keys=keys, options=options)
        row = _row(clip, index=index, seed=seed, fps=options.fps)
        path = out / row["path"]
        if not path.exists():  # files appear whole or not at all
            write_video(path, render(clip), fps=options.fps)
            rendered += 1
        rows.append(row)
        if on_progress is not None:
            on_progress(index + 1, clips)
    metadata = out / METADATA_NAME
    with atomic_path(metadata) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), partial)
    return ToyReport(metadata=metadata, rendered=rendered, kept=clips - rendered)


def _claim(out: Path, *, recipe: dict[str, Any]) -> None:
    """Marks the folder with the recipe of its clips, or checks that it is the recipe asked for."""
    marker = out / RECIPE_NAME
    if marker.is_file():
        try:
            found = read_json(marker)
        except ValueError as error:
            raise DataError(f"{marker}: damaged ({error}); remove the folder or choose another") from error
        if found != recipe:
            raise ConfigError(
                f"out={out} holds toy clips of another recipe ({_difference(found, recipe)}); "
                "choose another folder, or remove this one"
            )
        return
    if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise ConfigError(f"out={out} exists and is not a folder of toy clips; choose an empty or a new folder")
    write_json(marker, recipe)


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    flat = [{"seed": r.get("seed"), **r.get("options", {})} for r in (found, asked)]
    return ", ".join(
        f"{k}={flat[0].get(k)}, asked for {flat[1].get(k)}"
        for k in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(k) != flat[1].get(k)
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _row(clip: ToyClip, *, index: int, seed: int, fps: float) -> dict[str, Any]:
    return {
        "path": f"clips/{index:06d}.mp4",
        "text": clip.scene.caption,
        "num_frames": clip.shape.t,
        "height": clip.shape.h,
        "width": clip.shape.w,
        "fps": fps,
        "size": clip.scene.size,
        "colour": clip.scene.colour,
        "shape": clip.scene.shape,
        "moves": list(clip.scene.moves),
        "scale_px": clip.scale,
        "centres_px": [list(c) for c in clip.centres],
        "background": clip.background,
        "seed": seed,
        "index": index,
    }
