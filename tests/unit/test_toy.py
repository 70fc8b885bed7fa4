"""Toy video: the language, the files, and scores that pass what is right and fail each thing that is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import hash_file
from opensora_dist.core.video import Frames, read_video, write_video
from opensora_dist.parallel.keys import Keys
from opensora_dist.prepare.toy.generate import generate
from opensora_dist.prepare.toy.grammar import (
    COLOURS,
    SHAPES,
    SIZES,
    all_scenes,
    held_out_prompts,
    is_held_out,
    parse,
    training_scenes,
)
from opensora_dist.prepare.toy.render import ToyClip, ToyOptions, coverage, plan_clip, render
from opensora_dist.prepare.toy.score import score_video, summarise

SQUARE_64 = ToyOptions(sizes=((64, 64),), lengths=(16,))


def clips(count: int, *, seed: int = 0, options: ToyOptions = SQUARE_64) -> list[ToyClip]:
    return [plan_clip(i, keys=Keys(seed), options=options) for i in range(count)]


@pytest.fixture(scope="module")
def one() -> tuple[Frames, str]:
    """A clip with two movements along different axes, and its caption."""
    clip = next(c for c in clips(50) if len(c.scene.moves) == 2 and c.scene.moves == ("left", "up"))
    return render(clip), clip.scene.caption


# The language


def test_every_caption_is_read_back_as_its_scene() -> None:
    scenes = [*all_scenes(1), *all_scenes(2)]
    assert len(scenes) == len({s.caption for s in scenes}) == 3 * 8 * 4 * (4 + 12)
    assert all(parse(s.caption) == s for s in scenes)
    assert parse("a small red circle moves left, then up").moves == ("left", "up")


def test_a_wrong_prompt_is_told_every_wrong_word() -> None:
    with pytest.raises(ConfigError) as error:
        parse("a tiny red circel moves left, then left")
    assert len(error.value.problems) == 3
    assert "did you mean 'circle'" in str(error.value)
    with pytest.raises(ConfigError, match="a small red circle moves left, then up"):
        parse("two dogs in the snow")


def test_no_training_clip_has_a_held_out_caption() -> None:
    assert not any(is_held_out(c.scene) for c in clips(300))
    held_out = [s for n in (1, 2) for s in all_scenes(n) if is_held_out(s)]
    assert 0.07 < len(held_out) / 1536 < 0.13


def test_every_word_and_every_pair_of_moves_is_seen_in_training() -> None:
    scenes = [*training_scenes(1), *training_scenes(2)]
    assert {s.colour for s in scenes} == set(COLOURS)
    assert {s.shape for s in scenes} == set(SHAPES)
    assert {s.size for s in scenes} == set(SIZES)
    assert len({s.moves for s in scenes}) == 16


def test_held_out_prompts_are_unseen_distinct_keyed_and_balanced() -> None:
    prompts = held_out_prompts(40, seed=3)
    assert len(set(prompts)) == 40
    assert all(is_held_out(parse(p)) for p in prompts)
    assert sum(len(parse(p).moves) == 1 for p in prompts) == 20
    assert prompts == held_out_prompts(40, seed=3) != held_out_prompts(40, seed=4)
    assert held_out_prompts(8, seed=3) == prompts[:8]
    with pytest.raises(ConfigError, match="at most"):
        held_out_prompts(10_000, seed=0)


# Drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_around_its_centre_of_mass(shape: str) -> None:
    cover = coverage(shape, centre=(61.3, 66.8), scale=40.0, height=128, width=128)
    grid = np.arange(128) + 0.5
    assert cover.sum() == pytest.approx(1600, rel=0.01)
    assert (cover.sum(0) @ grid) / cover.sum() == pytest.approx(61.3, abs=0.05)
    assert (cover.sum(1) @ grid) / cover.sum() == pytest.approx(66.8, abs=0.05)


def test_objects_stay_inside_and_move_a_good_part_of_the_frame() -> None:
    for clip in clips(100, options=ToyOptions()):
        path = np.array(clip.centres)
        border = np.concatenate([*(render(clip)[:, [0, -1]].reshape(-1, 3),), render(clip)[:, :, [0, -1]].reshape(-1, 3)]).astype(
            int
        )
        assert (border.max(-1) - border.min(-1)).max() < 40  # grey
        for k, move in enumerate(clip.scene.moves):
            n = len(clip.scene.moves)
            span = path[round(k * (clip.shape.t - 1) / n) : round((k + 1) * (clip.shape.t - 1) / n) + 1]
            axis, side = (0, clip.shape.w) if move in ("left", "right") else (1, clip.shape.h)
            travel = span[-1, axis] - span[0, axis]
            assert abs(travel) > 0.2 * side
            assert (travel > 0) == (move in ("right", "down"))


def test_bad_options_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ToyOptions(sizes=((33, 64),), lengths=(4,), fps=0, moves=(3,), texture=2)
    assert len(error.value.problems) == 5


# Files


def test_files_and_truth_are_a_function_of_seed_and_index(tmp_path: Path) -> None:
    options = ToyOptions(sizes=((32, 32), (32, 48)), lengths=(8, 12))
    a = generate(tmp_path / "a", clips=6, seed=5, options=options)
    generate(tmp_path / "b", clips=3, seed=5, options=options)
    generate(tmp_path / "c", clips=3, seed=6, options=options)
    rows = [pq.read_table(tmp_path / n / "metadata.parquet").to_pylist() for n in "abc"]
    assert a.rendered == 6
    assert rows[0][:3] == rows[1]
    files = [[hash_file(tmp_path / n / r["path"]) for r in rows[i][:3]] for i, n in enumerate("abc")]
    assert files[0] == files[1]
    assert not set(files[0]) & set(files[2])
    assert len({(r["height"], r["width"], r["num_frames"]) for r in rows[0]}) > 1
    frames, fps = read_video(tmp_path / "a" / rows[0][0]["path"])
    assert frames.shape[:3] == (rows[0][0]["num_frames"], rows[0][0]["height"], rows[0][0]["width"])
    assert fps == pytest.approx(8)
    assert len(rows[0][0]["centres_px"]) == len(frames)
    assert parse(rows[0][0]["text"]).moves == tuple(rows[0][0]["moves"])


def test_a_file_does_not_depend_on_what_memory_held_before(tmp_path: Path) -> None:
    frames = render(clips(1)[0])[:, :32, :32]
    rng = np.random.default_rng(0)
    hashes = set()
    for _ in range(8):
        junk = [rng.integers(0, 256, int(size), dtype=np.uint8) for size in rng.integers(1_000, 200_000, 60)]
        del junk
        write_video(tmp_path / "a.mp4", frames, fps=8)
        hashes.add(hash_file(tmp_path / "a.mp4"))
    assert len(hashes) == 1


def test_a_cut_off_call_is_resumed_and_a_set_can_grow(tmp_path: Path) -> None:
    options = ToyOptions(sizes=((32, 32),), lengths=(8,))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, clips=4, seed=5, options=options, on_progress=stop)
    assert not (tmp_path / "metadata.parquet").exists()
    report = generate(tmp_path, clips=5, seed=5, options=options)
    assert (report.rendered, report.kept) == (3, 2)
    assert pq.read_table(report.metadata).num_rows == 5


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    options = ToyOptions(sizes=((32, 32),), lengths=(8,))
    generate(tmp_path / "toy", clips=1, seed=5, options=options)
    with pytest.raises(ConfigError, match="seed=5, asked for 6"):
        generate(tmp_path / "toy", clips=1, seed=6, options=options)
    with pytest.raises(ConfigError, match=r"texture=1.0, asked for 0.5"):
        generate(tmp_path / "toy", clips=1, seed=5, options=replace(options, texture=0.5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a folder of toy clips"):
        generate(tmp_path / "other", clips=1, seed=5, options=options)
    with pytest.raises(ConfigError, match="clips=0"):
        generate(tmp_path / "none", clips=0, seed=5)


# Scores


def test_true_clips_pass_every_question_after_h264(tmp_path: Path) -> None:
    options = ToyOptions(sizes=((64, 64), (64, 96), (96, 64)), lengths=(16, 24))
    generate(tmp_path, clips=40, seed=1, options=options)
    rows = pq.read_table(tmp_path / "metadata.parquet").to_pylist()
    summary = summarise([score_video(read_video(tmp_path / r["path"])[0], caption=r["text"]) for r in rows])
    assert min(summary.colour, summary.shape, summary.size, summary.whole, summary.direction) >= 0.98


def test_every_wrong_word_fails_its_own_question_only(one: tuple[Frames, str]) -> None:
    frames, caption = one
    scene = parse(caption)
    right = score_video(frames, caption=caption)
    assert (right.colour, right.shape, right.size, right.whole, right.moves) == (True, True, True, True, (True, True))
    for colour in COLOURS.keys() - {scene.colour}:
        assert replace(right, colour=False) == score_video(frames, caption=replace(scene, colour=colour).caption)
    for shape in set(SHAPES) - {scene.shape}:
        assert replace(right, shape=False) == score_video(frames, caption=replace(scene, shape=shape).caption)
    for size in SIZES.keys() - {scene.size}:
        assert replace(right, size=False) == score_video(frames, caption=replace(scene, size=size).caption)
    assert score_video(frames, caption=replace(scene, moves=("left", "down")).caption).moves == (True, False)
    assert score_video(frames, caption=replace(scene, moves=("right", "up")).caption).moves == (False, True)
    assert score_video(frames, caption=replace(scene, moves=("up", "left")).caption).direction == 0


def test_a_clip_played_backwards_moves_the_other_way(one: tuple[Frames, str]) -> None:
    frames, caption = one
    assert score_video(frames[::-1], caption=caption).direction == 0
    assert score_video(frames[::-1], caption=replace(parse(caption), moves=("down", "right")).caption).direction == 1


def test_an_object_in_two_pieces_is_not_whole() -> None:
    for clip in clips(12):
        frames = render(clip)
        for frame, (x, y) in zip(frames, clip.centres, strict=True):
            half = max(2, round(0.12 * clip.scale))
            frame[:, round(x) - half : round(x) + half] = clip.backdrop[:, round(x) - half : round(x) + half]
        assert not score_video(frames, caption=clip.scene.caption).whole


def test_a_second_object_is_not_one_whole_object(one: tuple[Frames, str]) -> None:
    frames, caption = one
    doubled = frames.copy()
    doubled[:, 2:12, 2:12] = COLOURS["cyan"]
    assert not score_video(doubled, caption=caption).whole


def test_an_object_that_comes_and_goes_is_not_whole(one: tuple[Frames, str]) -> None:
    frames, caption = one
    gone = frames.copy()
    gone[::4] = 128
    score = score_video(gone, caption=caption)
    assert not score.whole
    assert score.colour


def test_a_still_object_moves_nowhere(one: tuple[Frames, str]) -> None:
    frames, caption = one
    score = score_video(np.repeat(frames[:1], 16, axis=0), caption=caption)
    assert score.seen_moves == (None, None)
    assert score.whole


@pytest.mark.parametrize("kind", ["empty", "noise", "tinted"])
def test_a_clip_without_an_object_fails_everything(kind: str, one: tuple[Frames, str]) -> None:
    frames, caption = one
    rng = np.random.default_rng(0)
    fake = {
        "empty": np.full_like(frames, 120),
        "noise": rng.integers(0, 256, frames.shape, dtype=np.uint8),
        "tinted": np.broadcast_to(np.array(COLOURS["red"], np.uint8), frames.shape),
    }[kind]
    score = score_video(fake, caption=caption)
    assert not any((score.colour, score.shape, score.size, score.whole, *score.moves))
    assert score.seen_colour is None


def test_scores_survive_a_file_with_odd_sides(tmp_path: Path, one: tuple[Frames, str]) -> None:
    frames, caption = one
    write_video(tmp_path / "odd.mp4", frames[:, :63, :63], fps=8)
    assert score_video(read_video(tmp_path / "odd.mp4")[0], caption=caption).direction == 1


def test_backgrounds_keep_to_the_levels_asked_for() -> None:
    options = ToyOptions(sizes=((32, 32),), lengths=(8,), texture=0.5, levels=(20, 50))
    backdrops = [plan_clip(i, keys=Keys(0), options=options).backdrop for i in range(40)]
    # Half of the full contrast of 32 either way, and a tint of at most 8.
    assert max(int(b.max()) for b in backdrops) <= 50 + 16 + 8
    assert max(float(b.mean()) for b in backdrops) > 40
    assert min(float(b.mean()) for b in backdrops) < 30
    with pytest.raises(ConfigError, match=r"levels=\(90, 20\) must be two grey levels in order"):
        ToyOptions(levels=(90, 20))
