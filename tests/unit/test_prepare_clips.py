from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, iter_frames, write_video
from opensora_dist.prepare.clips import choose_bucket, cut_clips, resize_and_crop, sample_frames


def numbered(times_s: list[float]) -> Iterator[tuple[float, np.ndarray]]:
    return ((time_s, np.array(i)) for i, time_s in enumerate(times_s))


def picks(times_s: list[float], *, fps: float) -> list[int]:
    return [int(frame) for frame in sample_frames(numbered(times_s), fps=fps)]


def grey_video(path: Path, *, frames: int, height: int, width: int, fps: float = 8.0) -> None:
    """Frame i has grey level 10 * i."""
    levels = (10 * np.arange(frames, dtype=np.uint8)).reshape(-1, 1, 1, 1)
    write_video(path, np.broadcast_to(levels, (frames, height, width, 3)).copy(), fps=fps)


def cut_clip(path: Path, *, fps: float, buckets: Sequence[Thw]) -> Frames:
    (cut,) = cut_clips(iter_frames(path), fps=fps, buckets=buckets)
    return cut.frames_THW3


def levels(clip: np.ndarray) -> list[int]:
    return (clip.mean(axis=(1, 2, 3)) / 10).round().astype(int).tolist()


def test_the_videos_own_rate_takes_every_frame() -> None:
    assert picks([i / 8 for i in range(16)], fps=8) == list(range(16))


def test_a_lower_rate_takes_the_frame_at_or_before_each_moment() -> None:
    assert picks([i / 24 for i in range(12)], fps=8) == [0, 3, 6, 9]
    assert picks([i / 25 for i in range(13)], fps=8) == [0, 3, 6, 9, 12]  # at 0, .125, .25, .375, .5 s


def test_a_higher_rate_repeats_frames_until_the_last_one_ends() -> None:
    assert picks([0, 0.25, 0.5], fps=8) == [0, 0, 1, 1, 2, 2]


def test_timestamps_rounded_to_milliseconds_lose_no_frame() -> None:
    assert picks([round(i / 30, 3) for i in range(90)], fps=30) == list(range(90))


def test_uneven_timestamps_are_followed_rather_than_a_mean_rate() -> None:
    assert picks([0, 0.1, 1.0, 1.1, 2.0], fps=2) == [0, 1, 2, 3, 4]


def test_a_lone_frame_is_taken_once() -> None:
    assert picks([0], fps=8) == [0]


def test_no_frame_gives_none() -> None:
    assert picks([], fps=8) == []


BUCKETS = [Thw(16, 64, 64), Thw(16, 128, 128), Thw(32, 64, 64), Thw(16, 64, 112), Thw(16, 112, 64), Thw(1, 256, 256)]


@pytest.mark.parametrize(
    "frames, height, width, bucket",
    [
        (16, 720, 1280, Thw(16, 64, 112)),
        (16, 1280, 720, Thw(16, 112, 64)),  # portrait
        (100, 100, 100, Thw(32, 64, 64)),  # 128 would enlarge; the longest of the others
        (31, 100, 100, Thw(16, 64, 64)),
        (100, 200, 200, Thw(16, 128, 128)),  # size before length
        (100, 32, 32, Thw(32, 64, 64)),  # all enlarge: the least
        (2, 720, 1280, Thw(1, 256, 256)),  # too short for its own aspect ratio
        (0, 64, 64, None),
    ],
)
def test_bucket_is_nearest_in_aspect_then_largest_without_enlarging(
    frames: int, height: int, width: int, bucket: Thw | None
) -> None:
    assert choose_bucket(BUCKETS, frames=frames, height=height, width=width) == bucket
    assert choose_bucket(BUCKETS[::-1], frames=frames, height=height, width=width) == bucket


@pytest.mark.parametrize("height, width", [(35, 71), (71, 35), (64, 64), (200, 64), (16, 17), (1, 500)])
def test_resized_frames_have_the_size_asked_for(height: int, width: int) -> None:
    frame = np.zeros((height, width, 3), np.uint8)
    assert resize_and_crop(frame, height=64, width=64).shape == (64, 64, 3)


def test_resizing_keeps_the_aspect_ratio_and_the_centre() -> None:
    frame = np.zeros((40, 120, 3), np.uint8)
    frame[:, 40:80] = 255  # the middle square
    assert (resize_and_crop(frame, height=20, width=20) == 255).all()


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    assert np.array_equal(resize_and_crop(frame, height=24, width=32), frame)


def test_a_clip_is_the_start_of_its_video(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", frames=12, height=32, width=32)
    clip = cut_clip(tmp_path / "a.mp4", fps=4, buckets=[Thw(4, 16, 16), Thw(99, 16, 16)])
    assert clip.shape == (4, 16, 16, 3)
    assert levels(clip) == [0, 2, 4, 6]


def test_the_longest_bucket_that_the_video_fills_is_taken(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", frames=12, height=32, width=32)
    buckets = [Thw(t, 16, 16) for t in (1, 5, 12, 13)]
    assert cut_clip(tmp_path / "a.mp4", fps=8, buckets=buckets).shape == (12, 16, 16, 3)


def test_a_short_portrait_video_falls_back_to_another_aspect_ratio(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", frames=5, height=64, width=32)
    buckets = [Thw(8, 32, 16), Thw(4, 16, 16)]
    assert cut_clip(tmp_path / "a.mp4", fps=8, buckets=buckets).shape == (4, 16, 16, 3)
    grey_video(tmp_path / "b.mp4", frames=8, height=64, width=32)
    assert cut_clip(tmp_path / "b.mp4", fps=8, buckets=buckets).shape == (8, 32, 16, 3)


def test_one_frame_fills_a_bucket_of_images(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", frames=1, height=33, width=35)
    assert cut_clip(tmp_path / "a.mp4", fps=8, buckets=[Thw(1, 16, 16), Thw(16, 16, 16)]).shape == (1, 16, 16, 3)


def test_a_video_shorter_than_every_bucket_says_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", frames=6, height=32, width=32)
    with pytest.raises(DataError, match=r"has 3 frames at 4 per second, the shortest bucket needs 8; .*clip\.buckets"):
        cut_clip(tmp_path / "a.mp4", fps=4, buckets=[Thw(8, 16, 16), Thw(16, 16, 16)])


def test_decoding_stops_once_no_further_frame_can_matter() -> None:
    decoded = 0

    def endless() -> Iterator[tuple[float, np.ndarray]]:
        nonlocal decoded
        while True:
            decoded += 1
            yield (decoded - 1) / 8, np.zeros((32, 32, 3), np.uint8)

    # The 99-frame bucket has another shape, which a square video never takes.
    (cut,) = cut_clips(endless(), fps=8, buckets=[Thw(4, 16, 16), Thw(99, 16, 32)])
    assert cut.frames_THW3.shape == (4, 16, 16, 3)
    assert decoded == 5  # one more than sampled: a frame is known to be the last before a moment by the next one


# Shots and windows


def grey_frames(count: int, *, fps: float = 8.0) -> Iterator[tuple[float, np.ndarray]]:
    """Frame i has grey level i."""
    return ((i / fps, np.full((32, 32, 3), i, np.uint8)) for i in range(count))


def spans(cuts: Iterator[object]) -> list[tuple[float, list[int]]]:
    return [(cut.start_s, cut.frames_THW3[:, 0, 0, 0].tolist()) for cut in cuts]


def test_windows_follow_each_other_longest_first_and_what_is_left_fills_shorter_ones() -> None:
    buckets = [Thw(8, 16, 16), Thw(4, 16, 16)]
    found = spans(cut_clips(grey_frames(23), fps=8, buckets=buckets, every=True))
    assert found == [(0.0, list(range(8))), (1.0, list(range(8, 16))), (2.0, list(range(16, 20)))]


def test_one_window_from_the_start_of_each_shot_and_none_across_a_cut() -> None:
    shots = [(0, 6), (6, 9), (9, 20)]
    found = spans(cut_clips(grey_frames(20), fps=8, buckets=[Thw(4, 16, 16)], shots=shots))
    assert found == [(0.0, [0, 1, 2, 3]), (9 / 8, [9, 10, 11, 12])]


def test_windows_of_each_shot_start_anew() -> None:
    shots = [(0, 9), (9, 18)]
    found = spans(cut_clips(grey_frames(18), fps=8, buckets=[Thw(4, 16, 16)], shots=shots, every=True))
    assert [start for start, _ in found] == [0, 4 / 8, 9 / 8, 13 / 8]
    assert found[2][1] == [9, 10, 11, 12]


def test_frames_between_shots_are_of_no_clip() -> None:
    found = spans(cut_clips(grey_frames(20), fps=8, buckets=[Thw(4, 16, 16)], shots=[(2, 8), (12, 20)], every=True))
    assert [frames for _, frames in found] == [[2, 3, 4, 5], [12, 13, 14, 15], [16, 17, 18, 19]]


def test_both_ends_of_a_shot_are_trimmed() -> None:
    found = spans(cut_clips(grey_frames(40), fps=8, buckets=[Thw(4, 16, 16)], shots=[(0, 20), (20, 40)], trim_s=0.5, every=True))
    assert [frames for _, frames in found] == [
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [24, 25, 26, 27],
        [28, 29, 30, 31],
        [32, 33, 34, 35],
    ]


def test_a_bucket_of_one_frame_does_not_take_what_windows_leave_over() -> None:
    buckets = [Thw(8, 16, 16), Thw(1, 16, 16)]
    assert [len(frames) for _, frames in spans(cut_clips(grey_frames(13), fps=8, buckets=buckets, every=True))] == [8]
    assert [len(frames) for _, frames in spans(cut_clips(grey_frames(5), fps=8, buckets=buckets, every=True))] == [1]


def test_decoding_stops_behind_the_last_clip_of_the_last_shot() -> None:
    frames = grey_frames(100)
    list(cut_clips(frames, fps=8, buckets=[Thw(4, 16, 16)], shots=[(0, 10), (10, 100)]))
    assert next(frames)[0] < 2.5


def at(*times_s: float) -> Iterator[tuple[float, np.ndarray]]:
    """Frame i has grey level i."""
    return ((time_s, np.full((32, 32, 3), i, np.uint8)) for i, time_s in enumerate(times_s))


def test_a_gap_in_the_timestamps_ends_a_shot_rather_than_filling_an_hour_with_one_frame() -> None:
    times = [i / 8 for i in range(10)] + [3600 + i / 8 for i in range(10)]
    found = spans(cut_clips(at(*times), fps=8, buckets=[Thw(4, 16, 16)], every=True))
    assert found == [(0.0, [0, 1, 2, 3]), (0.5, [4, 5, 6, 7]), (3600.0, [10, 11, 12, 13]), (3600.5, [14, 15, 16, 17])]
    assert spans(cut_clips(at(*times), fps=8, buckets=[Thw(4, 16, 16)])) == found[:1]  # still one clip a shot


def test_where_the_first_frame_stands_alone_the_clip_is_taken_behind_it() -> None:
    times = [0.0] + [60 + i / 8 for i in range(10)]
    for every in (False, True):
        assert spans(cut_clips(at(*times), fps=8, buckets=[Thw(4, 16, 16)], every=every))[0] == (60.0, [1, 2, 3, 4])


def test_a_slide_show_has_no_gaps() -> None:
    found = spans(cut_clips(at(0, 5, 10, 15, 20), fps=0.2, buckets=[Thw(4, 16, 16)], every=True))
    assert found == [(0.0, [0, 1, 2, 3])]
