"""Video files in and out (PyAV), images in (Pillow), and contact sheets. Frames are uint8 RGB arrays of shape [T, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import atomic_path

Frames = NDArray[np.uint8]
SHEET_COLUMNS = 8
_ODDEST_PIXEL = 8  # times as wide as high, or the reverse; what a header says beyond that is damage
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})


def iter_frames(file: Path | BinaryIO, *, max_width: int | None = None) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Decodes a video frame by frame: (seconds from the first frame, frame [H, W, 3]). An image is a video of one frame.

    Counts and durations in containers lie, so nothing here trusts them.

    Args:
        file: A path, or a seekable file with a ``name``; an image where that ends as one.
        max_width: Wider video is scaled down to it on the way to RGB, which costs less than doing so afterwards. Width is that of what
            is stored, before it is turned.
    Raises:
        DataError: The file is missing, empty, no single video, or breaks off in the middle; or the next frame is damaged, which decoders
            hide by guessing.
    """
    path = file if isinstance(file, Path) else Path(file.name)
    if file is path:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the path in the caption table")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes); fetch or render it again")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        yield 0.0, _read_image(file, path)
        return
    with open_video(file) as (container, stream):
        # Not by frames: H.264 then gives out frames before it is known whether they are whole. Workers take a file each.
        stream.thread_type = "SLICE"
        rate, aspect = stream.average_rate or Fraction(25), pixel_aspect(stream)
        first: float | None = None
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise DataError(f"{path}: frame {index} is damaged; fetch the file again, re-encode it, or leave it out")
            time_s = float(frame.time) if frame.time is not None else float(index / rate)
            first = time_s if first is None else first
            yield time_s - first, _picture(frame, max_width, aspect)


@contextmanager
def open_video(file: Path | BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its first video stream. Titles and other tags may be of any encoding.

    Raises:
        DataError: Whatever goes wrong with this file, now or while it is read; it has no video stream; or it is a list of other files.
    """
    path = file if isinstance(file, Path) else Path(file.name)
    try:
        with av.open(str(file) if isinstance(file, Path) else file, metadata_errors="ignore") as container:
            if container.format.name == "concat":
                raise DataError(f"{path}: is a list of other files; give these instead, or leave it out")
            if not container.streams.video:
                raise DataError(f"{path}: no video stream; expected a video file")
            yield container, container.streams.video[0]
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PyAV raises what fits: of FFmpeg, of text that can't be read, of numbers that are too large
        raise DataError(f"{path}: can't be decoded ({error}); re-encode it, or leave it out") from error


def pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel in heights, as the headers say; 1 where they don't."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / _ODDEST_PIXEL <= aspect <= _ODDEST_PIXEL else 1.0


def peek_frames(file: Path | BinaryIO, *, start_s: float, end_s: float, count: int, max_width: int) -> list[NDArray[np.uint8]]:
    """At most ``count`` frames [H, W, 3] of a stretch of a video, about evenly spaced: to look at, not to count on.

    Decoding begins at the key frame before the stretch. Of an image it is the image.

    Raises:
        DataError: As ``iter_frames``.
    """
    path = file if isinstance(file, Path) else Path(file.name)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [_read_image(file, path)]
    wanted = [start_s + (end_s - start_s) * (i + 0.5) / count for i in range(count)]
    found: list[NDArray[np.uint8]] = []
    with open_video(file) as (container, stream):
        assert stream.time_base is not None
        first, aspect = stream.start_time or 0, pixel_aspect(stream)
        container.seek(first + int(start_s / stream.time_base), stream=stream)
        frame = None
        for frame in container.decode(stream):
            if len(found) == count:
                break
            if frame.pts is not None and float((frame.pts - first) * stream.time_base) >= wanted[len(found)]:
                found.append(_picture(frame, max_width, aspect))
        if not found and frame is not None:  # the video ends before; its last frame says more than none
            found.append(_picture(frame, max_width, aspect))
    return found


def _picture(frame: av.VideoFrame, max_width: int | None, aspect: float) -> NDArray[np.uint8]:
    """A decoded frame, [H, W, 3], as it is to be seen: with square pixels, upright."""
    width = frame.width * aspect
    scale = 1.0 if max_width is None else min(1.0, max_width / width)
    picture = frame.to_ndarray(format="rgb24", width=max(1, round(width * scale)), height=max(1, round(frame.height * scale)))
    # Phones store pictures as the sensor lies and say by how many degrees, counter-clockwise, to turn them.
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))


def _read_image(file: Path | BinaryIO, path: Path) -> NDArray[np.uint8]:
    """An image as it is meant to be seen, [H, W, 3]: turned as its camera says, on white where it is transparent, of an animation the
    first picture."""
    try:
        with Image.open(file) as image:
            image.load()
            if image.mode.startswith("I;16"):  # Pillow cuts these off at 255
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            turned = ImageOps.exif_transpose(image)
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
            return np.array(turned.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # each format of Pillow has errors of its own
        raise DataError(f"{path}: can't be decoded ({error}); write it again, or leave it out") from error


def read_video(path: Path) -> tuple[Frames, float]:
    """A whole video: frames [T, H, W, 3] and the mean frames per second.

    Raises:
        DataError: As ``iter_frames``, or the video holds no frame.
    """
    times: list[float] = []
    frames: list[NDArray[np.uint8]] = []
    for time_s, frame in iter_frames(path):
        times.append(time_s)
        frames.append(frame)
    if not frames:
        raise DataError(f"{path}: holds no video frame; leave it out")
    span_s = times[-1] - times[0]
    fps = (len(frames) - 1) / span_s if span_s > 0 else 1.0
    return np.stack(frames), fps


def write_video(path: Path, frames: Frames, *, fps: float, crf: int = 18) -> None:
    """Writes H.264 mp4 (yuv420p) atomically. Odd heights and widths are padded by one edge pixel, as H.264 needs even ones.

    Args:
        path: Where to; parent folders are made.
        frames: uint8 [T, H, W, 3].
        fps: Frames per second.
        crf: x264 quality, 0 (lossless) to 51.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, (frames.dtype, frames.shape)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        # One encoding thread: x264's output depends on the number of threads, and clips must be equal on every machine.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # No macroblock tree: on small frames its assembly reads memory it never wrote, and no two files are the same.
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def even_places(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` places, from the first to the last; of one, the middle."""
    if count == 1:
        return [total // 2] if total > 0 else []
    places: list[int] = np.linspace(0, total - 1, max(0, min(count, total))).round().astype(int).tolist()
    return places


def evenly_spaced(frames: Frames, count: int) -> Frames:
    """A copy of at most ``count`` frames, those of ``even_places``."""
    picks: Frames = frames[even_places(len(frames), count)]
    return picks


def contact_sheet(path: Path, videos: Sequence[Frames], *, columns: int = SHEET_COLUMNS, captions: Sequence[str] = ()) -> None:
    """Writes a PNG with one row per video and ``columns`` frames of it, evenly spaced; captions go above the rows."""
    from PIL import ImageDraw

    assert videos, "a contact sheet of no video"
    rows: list[Image.Image] = []
    for i, frames in enumerate(videos):
        picks = evenly_spaced(frames, columns)
        strip = np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0))) for frame in picks], axis=1)
        scale = max(1, 96 // frames.shape[1])
        image = Image.fromarray(strip).resize((strip.shape[1] * scale, strip.shape[0] * scale), Image.Resampling.NEAREST)
        if captions:
            framed = Image.new("RGB", (image.width, image.height + 14), "white")
            framed.paste(image, (0, 14))
            ImageDraw.Draw(framed).text((2, 1), captions[i], fill="black")
            image = framed
        rows.append(image)
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_path(path) as partial:
        sheet.save(partial)
