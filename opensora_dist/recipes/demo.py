"""The whole way on this machine: toy videos, preparation, training, a sampled video, scores, a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.types import Thw
from opensora_dist.observe.progress import Bar
from opensora_dist.observe.report import write_report
from opensora_dist.prepare.toy.generate import generate
from opensora_dist.prepare.toy.grammar import held_out_prompts
from opensora_dist.prepare.toy.render import ToyOptions
from opensora_dist.recipes.evaluate import Evaluation, evaluate
from opensora_dist.recipes.prepare import prepare_dataset
from opensora_dist.recipes.sample import SampleFiles, sample
from opensora_dist.recipes.train import train
from opensora_dist.train.generate import SamplingOptions

_CONFIGS = Path(__file__).parent / "configs"
_CLIPS = 1500
_SIZE = (32, 32)
_FRAMES = 16
_CPU_RANKS = 2
_SP_DEGREE = 2
_SCORED = 16
_DRAWN = 4


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where the demo put what it made."""

    run_dir: Path
    samples: SampleFiles
    evaluation: Evaluation
    report: Path
    seconds: float


def demo(out: Path, *, clips: int = _CLIPS, steps: int | None = None, say: Callable[[str], None]) -> DemoResult:
    """Runs everything into one folder. A second call goes on where the first was cut off.

    Args:
        out: The demo's folder.
        clips: Toy clips to train on.
        steps: Optimizer steps; None as in the demo's config.
        say: Shows a heading before each stage.
    Raises:
        OpensoraError: A stage failed; the message is the stage's.
    """
    began = time.monotonic()
    videos, shards, run_dir = out / "videos", out / "shards", out / "run"
    say(f"1/5 toy videos: {clips} captioned H.264 clips into {videos}")
    with Bar("toy clips", total=clips) as bar:
        options = ToyOptions(sizes=(_SIZE,), lengths=(_FRAMES,), moves=(1,), texture=0.5, levels=(20, 50))
        generate(videos, clips=clips, seed=0, options=options, on_progress=lambda done, _: bar.update(done))
    say(f"2/5 preparation: decode, encode, WebDataset shards and index into {shards}")
    prepare_dataset(_CONFIGS / "demo_prepare.yaml", overrides=[f"input.path={videos}", f"output.path={shards}"])
    gpus = torch.cuda.device_count()
    ranks = max(n for n in (1, 2, 4, 8, 16) if n <= gpus) if gpus else _CPU_RANKS  # those that divide the demo's batch of 16
    shared_by = min(_SP_DEGREE, ranks)
    say(f"3/5 training: STDiT by rectified flow on {ranks} ranks, {shared_by} to a video, into {run_dir}")
    overrides = [f"data.path={shards}", f"run.dir={run_dir}", f"parallel.nproc={ranks}", f"parallel.sp.degree={shared_by}"]
    code = train(_CONFIGS / "demo_train.yaml", overrides=[*overrides, *([f"run.steps={steps}"] if steps else [])])
    if code:
        raise OpensoraError(f"training failed with exit code {code}; the last lines above and {run_dir / 'logs'} say why")
    say("4/5 sampling: videos of captions the model has never seen, and their scores")
    drawing = SamplingOptions(sampler=None, steps=20, cfg_scale=2.0)
    files = sample(
        run_dir,
        prompts=held_out_prompts(_DRAWN, seed=1, num_moves=(1,)),
        out=None,
        count=1,
        clip=None,
        options=drawing,
        seed=0,
        batch=8,
        device="auto",
        weights="ema",
    )
    with Bar("scored videos", total=_SCORED) as bar:
        evaluation = evaluate(
            run_dir,
            count=_SCORED,
            num_moves=(1,),
            repeats=1,
            out=None,
            clip=Thw(_FRAMES, *_SIZE),
            options=drawing,
            seed=0,
            batch=8,
            device="auto",
            weights="ema",
            on_progress=bar.update,
        )
    assert files is not None and evaluation is not None  # they are on the first rank, which a process alone is
    say("5/5 report")
    report = write_report(run_dir)
    return DemoResult(run_dir=run_dir, samples=files, evaluation=evaluation, report=report, seconds=time.monotonic() - began)
