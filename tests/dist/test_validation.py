"""Validation videos during training leave no trace in the run, and what fails of them never ends it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from dataset_factory import write_dataset
from training import SAMPLES, assert_same_tensors, curve, events, overrides, tensors, train_here

from opensora_dist.core.video import read_video
from opensora_dist.train import validation

STEPS = 12
CLIP = (3, 32, 48)
PROMPTS = ["a red circle", "a blue square moves", "green"]


def _validate(prompts, every=3):
    return [f"validation.every_steps={every}", f"validation.prompts={prompts}", "validation.sampling_steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("validation") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_validation_changes_no_loss_and_no_weight(ranks, data, stage, tmp_path):
    shared = [f"run.steps={STEPS}", f"parallel.zero.stage={stage}"]
    ranks.run(train_here, overrides(data, tmp_path / "without", *shared), world=2)
    ranks.run(train_here, overrides(data, tmp_path / "with", *shared, *_validate(PROMPTS)), world=2)
    assert [e["step"] for e in events(tmp_path / "with", "validation")] == [3, 6, 9, 12]
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert_same_tensors(tensors(tmp_path / "with"), tensors(tmp_path / "without"))


@pytest.mark.parametrize("stage, num_prompts", [(0, 3), (3, 3), (0, 1), (3, 1)])
def test_every_prompt_gets_its_video_on_two_ranks(ranks, data, stage, num_prompts, tmp_path):
    args = overrides(data, tmp_path, "run.steps=2", f"parallel.zero.stage={stage}", *_validate(PROMPTS[:num_prompts], every=2))
    ranks.run(train_here, args, world=2)
    videos = sorted((tmp_path / "samples" / "step-00000002").glob("*.mp4"))
    assert [v.name for v in videos] == [f"{i:03d}.mp4" for i in range(num_prompts)]
    for video in videos:
        assert read_video(video)[0].shape == (*CLIP, 3)
    assert events(tmp_path, "end")[0]["validation_failures"] == 0


def test_a_prompts_video_does_not_depend_on_the_number_of_ranks(ranks, data, tmp_path):
    for world in (1, 2):
        args = overrides(data, tmp_path / str(world), "run.steps=1", "run.dtype=float64", *_validate(PROMPTS, every=1))
        ranks.run(train_here, args, world=world)
    for i in range(len(PROMPTS)):
        one, two = (read_video(tmp_path / w / "samples" / "step-00000001" / f"{i:03d}.mp4")[0].astype(int) for w in "12")
        assert abs(one - two).max() <= 1, i


def _note_writes(folder):
    """Each rank notes the videos that it writes in a file of its own."""
    real = validation.write_video

    def write_video(path, frames, **options):
        with open(Path(folder) / f"rank-{dist.get_rank()}.txt", "a") as notes:
            notes.write(f"{path.name}\n")
        real(path, frames, **options)

    return mock.patch.object(validation, "write_video", write_video)


@pytest.mark.parametrize(
    "world, stage, writers", [(2, 0, {0: "012"}), (4, 3, {0: "01", 2: "2"})], ids=["sp 2", "dp 2 x sp 2, zero 3"]
)
def test_ranks_that_share_samples_draw_each_video_together_and_the_first_writes_it_once(
    ranks, data, world, stage, writers, tmp_path
):
    def args(name):
        return [*overrides(data, tmp_path / name, "run.steps=1", "run.dtype=float64"), *_validate(PROMPTS, every=1)]

    (tmp_path / "notes").mkdir()
    shared = ["parallel.sp.degree=2", f"parallel.zero.stage={stage}"]
    ranks.run(train_here, args("one"), world=1)
    ranks.run(train_here, [*args("shared"), *shared], _note_writes, tmp_path / "notes", world=world)
    noted = {int(path.stem[-1]): path.read_text().split() for path in (tmp_path / "notes").iterdir()}
    assert noted == {rank: [f"00{i}.mp4" for i in which] for rank, which in writers.items()}
    for i in range(len(PROMPTS)):
        names = (tmp_path / run / "samples" / "step-00000001" / f"{i:03d}.mp4" for run in ("one", "shared"))
        one, together = (read_video(name)[0].astype(int) for name in names)
        assert abs(one - together).max() <= 1, i
    assert events(tmp_path / "shared", "end")[0]["validation_failures"] == 0


def test_videos_that_can_not_be_written_are_counted_and_end_nothing(ranks, data, tmp_path):
    (tmp_path / "samples").write_text("not a folder")
    ranks.run(train_here, overrides(data, tmp_path, "run.steps=6", *_validate(PROMPTS)), world=2)
    assert len(curve(tmp_path)) == 6
    # Two rounds, on two ranks.
    assert [e["validation_failures"] for e in events(tmp_path, "end")] == [4]
