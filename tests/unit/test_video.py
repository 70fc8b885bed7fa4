from __future__ import annotations

import io
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from opensora_dist.core.errors import DataError
from opensora_dist.core.video import contact_sheet, even_places, evenly_spaced, iter_frames, peek_frames, read_video, write_video
from opensora_dist.prepare.probe import probe_source
from opensora_dist.prepare.sources import Source


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


def test_frames_before_a_damaged_one_are_given_and_then_it_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, fps=8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as container:
        middles = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size]
    for middle in middles[10::2]:
        data[middle : middle + 40] = bytes(40)
    (tmp_path / "a.mp4").write_bytes(data)
    with av.open(str(tmp_path / "a.mp4")) as container:
        container.streams.video[0].thread_type = "SLICE"
        damaged = [frame.is_corrupt for frame in container.decode(video=0)]
    assert len(damaged) == 24 and damaged.index(True) >= 10, "the decoder hides the damage"
    given = []
    with pytest.raises(DataError, match=rf"a\.mp4: frame {damaged.index(True)} is damaged; "):
        given.extend(time_s for time_s, _ in iter_frames(tmp_path / "a.mp4"))
    assert len(given) == damaged.index(True)


def test_tags_may_be_of_any_encoding(tmp_path):
    write_video(tmp_path / "a.mp4", _frames(5, 32, 32), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as whole, av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        container.metadata["title"] = "caf-QQ"
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    data = (tmp_path / "a.mkv").read_bytes()
    assert b"caf-QQ" in data
    (tmp_path / "a.mkv").write_bytes(data.replace(b"caf-QQ", "café Q".encode("latin-1")))
    assert len(list(iter_frames(tmp_path / "a.mkv"))) == 5
    assert len(peek_frames(tmp_path / "a.mkv", start_s=0, end_s=0.5, count=2, max_width=16)) == 2
    source = Source(path=tmp_path / "a.mkv", name="a.mkv", caption="", num_bytes=len(data), mtime_ns=1)
    assert (probe_source(source).height, probe_source(source).fps) == (32, 8)


class _Unlucky(io.BytesIO):
    name = "unlucky.mp4"

    def read(self, size=-1):
        raise OverflowError("too large")


@pytest.mark.parametrize("name", ["unlucky.mp4", "unlucky.png"])
def test_whatever_goes_wrong_in_a_file_is_said_with_its_name(name):
    file = _Unlucky(b"x" * 100)
    file.name = name
    with pytest.raises(DataError, match=rf"{name}: can't be decoded"):
        list(iter_frames(file))


def test_a_list_of_other_files_is_no_video(tmp_path):
    write_video(tmp_path / "a.mp4", _frames(5, 32, 32), fps=8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(DataError, match=r"list\.mp4: is a list of other files; "):
        list(iter_frames(tmp_path / "list.mp4"))


@pytest.mark.parametrize(
    ("aspect", "shape"),
    [(Fraction(16, 9), (64, 85, 3)), (Fraction(1, 2), (64, 24, 3)), (Fraction(1), (64, 48, 3)), (Fraction(1000), (64, 48, 3))],
    ids=str,
)
def test_pixels_that_are_not_square_are_made_so(tmp_path, aspect, shape):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in _frames(3, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert [frame.shape for _, frame in iter_frames(tmp_path / "a.mp4")] == [shape] * 3
    height, width, _ = next(iter_frames(tmp_path / "a.mp4", max_width=16))[1].shape
    assert (height, width) == (round(64 * 16 / shape[1]), 16)
    assert peek_frames(tmp_path / "a.mp4", start_s=0, end_s=0.1, count=1, max_width=16)[0].shape == (height, width, 3)


def test_frames_are_picked_evenly_each_once():
    assert [even_places(9, count) for count in (1, 2, 3, 5)] == [[4], [0, 8], [0, 4, 8], [0, 2, 4, 6, 8]]
    assert even_places(0, 4) == even_places(0, 1) == []
    for total in range(1, 40):
        for count in range(1, 45):
            places = even_places(total, count)
            assert len(set(places)) == len(places) == min(count, total) and places == sorted(places)
    frames = _frames(9, 4, 4)
    assert (evenly_spaced(frames, 3) == frames[[0, 4, 8]]).all()


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
