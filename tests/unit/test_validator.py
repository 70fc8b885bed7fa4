"""What becomes of validation videos on one rank: failures of their thread, and files that an earlier run left."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from av.error import FFmpegError
from dataset_factory import SPEC

from opensora_dist.codecs.registry import build_codec
from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import read_video
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.local import whole
from opensora_dist.train import validation
from opensora_dist.train.generate import SamplingOptions
from opensora_dist.train.validation import Validator

CPU = torch.device("cpu")
LATENT = Thw(2, 2, 3)
EMA = SimpleNamespace(shadow={})
BACKEND = SimpleNamespace(inference=lambda weights: nullcontext(None))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A validator of one rank; its model draws latents that are all 1."""
    monkeypatch.setattr(
        validation, "generate_latents", lambda model, *, texts, **rest: torch.full((len(texts), SPEC.channels, *LATENT), 1.0)
    )

    def build(rank=0, world=1, prompts=("a", "b")):
        return Validator(
            tmp_path,
            prompts=prompts,
            texts=[torch.zeros(1, SPEC.text_width)] * len(prompts),
            latent=LATENT,
            spec=SPEC,
            codec=build_codec(SPEC.codec, device=CPU),
            objective=None,
            options=SamplingOptions(sampler=None, steps=1, cfg_scale=1.0),
            keys=Keys(0),
            mesh=SimpleNamespace(
                rank=rank, token_rank=rank, token_ranks=world, tp_rank=0, world=world, is_main=rank == 0, device=CPU
            ),
            shards=whole,
        )

    return build


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), FFmpegError(1, "no encoder"), OSError("disk full"), DataError("no")],
    ids=repr,
)
def test_whatever_fails_in_the_thread_is_counted_and_not_asked_for_again(make, monkeypatch, error):
    def fail(*args, **options):
        raise error

    validator = make()
    with monkeypatch.context() as patch:
        patch.setattr(validation, "write_video", fail)
        validator.run(BACKEND, EMA, step=3)
        validator._pool.submit(lambda: None).result()
    validator.collect()
    assert validator.failures == 1
    assert validator.take_finished() == [] and validator._unshown == []
    validator.run(BACKEND, EMA, step=6)
    validator.close()
    assert validator.failures == 1
    assert [step for step, _ in validator.take_finished()] == [6]


def test_an_error_of_our_own_logic_is_not_swallowed(make, monkeypatch):
    def fail(*args, **options):
        raise TypeError("ours")

    monkeypatch.setattr(validation, "write_video", fail)
    validator = make()
    validator.run(BACKEND, EMA, step=3)
    with pytest.raises(TypeError, match="ours"):
        validator.close()


def test_videos_of_a_run_that_was_cut_off_are_not_given_out_for_those_drawn_again(make, tmp_path, monkeypatch):
    folder = tmp_path / "samples" / "step-00000003"
    folder.mkdir(parents=True)
    for name in ("000.mp4", "001.mp4"):
        (folder / name).write_bytes(b"old")
    validator, go = make(), validation.Future()
    written = validator._write
    monkeypatch.setattr(validator, "_write", lambda *args: go.result() or written(*args))
    validator.run(BACKEND, EMA, step=3)
    assert validator.take_finished() == []
    go.set_result(None)
    validator.close()
    ((step, files),) = validator.take_finished()
    assert step == 3 and [f.name for f in files] == ["000.mp4", "001.mp4"]
    assert all(read_video(f)[0].shape == (2, 16, 24, 3) for f in files)
    assert validator.take_finished() == []


def test_a_round_that_failed_on_another_rank_is_let_go_once_a_later_one_is_there(make):
    main, other = make(rank=0, world=2), make(rank=1, world=2)
    main.run(BACKEND, EMA, step=3)  # the other rank's video of this round never comes
    for validator in (main, other):
        validator.run(BACKEND, EMA, step=6)
        validator.close()
    assert [step for step, _ in main.take_finished()] == [6]
    assert main._unshown == []
