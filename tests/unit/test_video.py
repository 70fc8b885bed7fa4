from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from opensora_dist.core.errors import DataError
from opensora_dist.core.video import contact_sheet, iter_frames, peek_frames, read_video, write_video


def _frames(t, h, w):
    """Smooth, so that chroma subsampling costs little; different in time and in both directions."""
    time, y, x = np.meshgrid(np.arange(t), np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    channels = [60 + 100 * x + 5 * time, 200 - 120 * y, 80 + 60 * x * y + 4 * time]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(7, 48, 64), (5, 33, 47), (1, 32, 32), (3, 17, 64)], ids=str)
def test_a_video_comes_back_close_to_what_was_written(tmp_path, shape):
    frames = _frames(*shape)
    write_video(tmp_path / "a.mp4", frames, fps=8, crf=4)
    back, fps = read_video(tmp_path / "a.mp4")
    t, h, w = shape
    assert back.shape == (t, h + h % 2, w + w % 2, 3)
    assert abs(back[:, :h, :w].astype(int) - frames).mean() < 2.5
    assert fps == pytest.approx(8 if t > 1 else 1)
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("fps", [8, 23.976, 29.97, 0.5])
def test_frames_carry_their_times(tmp_path, fps):
    write_video(tmp_path / "a.mp4", _frames(4, 32, 32), fps=fps)
    times = [time_s for time_s, _ in iter_frames(tmp_path / "a.mp4")]
    assert times == pytest.approx([i / fps for i in range(4)], rel=1e-3)


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", _frames(5, 48, 48), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_missing_an_empty_and_a_corrupt_file_are_named_with_a_way_out(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for name, said in [("gone.mp4", "no such file"), ("empty.mp4", "0 bytes"), ("noise.mp4", "can't be decoded")]:
        with pytest.raises(DataError, match=said) as error:
            read_video(tmp_path / name)
        assert name in str(error.value) and ";" in str(error.value)


def test_a_file_cut_in_the_middle_is_an_error_not_a_short_video(tmp_path):
    write_video(tmp_path / "a.mp4", _frames(16, 64, 64), fps=8)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError):
        write_video(tmp_path / "a.mp4", _frames(2, 32, 32).astype(np.float32), fps=8)
    with pytest.raises((OSError, ValueError)):
        write_video(tmp_path / "b.mp4", _frames(2, 32, 32), fps=-1)
    assert os.listdir(tmp_path) == []


def test_a_contact_sheet_has_a_row_per_video_of_any_size(tmp_path):
    contact_sheet(tmp_path / "s.png", [_frames(9, 96, 96), _frames(2, 96, 130)], columns=4, captions=["one", "two"])
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (4 * 98, 2 * (98 + 14))


def test_a_peek_gives_frames_of_the_stretch_asked_for(tmp_path):
    levels = np.repeat(np.arange(0, 240, 5, dtype=np.uint8), 1)  # 48 frames at 8 per second; frame i is grey 5 i
    write_video(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (48, 32, 48, 3)).copy(), fps=8)
    frames = peek_frames(tmp_path / "a.mp4", start_s=3, end_s=5, count=4, max_width=24)
    assert [f.shape for f in frames] == [(16, 24, 3)] * 4
    assert [round(f.mean() / 5) for f in frames] == [26, 30, 34, 38]  # at 3.25, 3.75, 4.25, 4.75 s
    with open(tmp_path / "a.mp4", "rb") as file:
        assert len(peek_frames(file, start_s=5.5, end_s=9, count=4, max_width=24)) == 1
