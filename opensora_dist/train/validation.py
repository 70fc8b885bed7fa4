"""Validation videos during training: drawn from the moving average, on all ranks, without a trace in the run.

The draws are keyed, weights are put back bitwise, and no state of the training draws is touched, so a run with validation has the
losses of a run without. Decoding and writing happen on a thread while training goes on; what fails there is reported and counted,
and never ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from av.error import FFmpegError
from torch import Tensor

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.io import write_json
from opensora_dist.core.layout import SAMPLES_DIR
from opensora_dist.core.logging import get_logger
from opensora_dist.core.protocols import VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.core.video import write_video
from opensora_dist.diffusion.base import Objective
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.train.ema import Ema
from opensora_dist.train.generate import SamplingOptions, generate_latents, noise_ids, to_frames

_log = get_logger(__name__)


class Validator:
    """Draws the validation prompts, shared out over the groups of ranks that share samples; each group draws a video together.

    Args:
        prompts: Captions.
        texts: Their token vectors.
        latent: Latent shape of the videos.
        keys: Of the run; every round draws from the same noise, so that rounds can be compared by eye.
        shards: This rank's part of samples of a latent shape.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        prompts: Sequence[str],
        texts: Sequence[Tensor],
        latent: Thw,
        spec: DatasetSpec,
        codec: VideoCodec,
        objective: Objective,
        options: SamplingOptions,
        keys: Keys,
        mesh: Mesh,
        shards: Callable[[Thw], Shard],
    ) -> None:
        assert prompts, "validation without prompts"
        self.failures = 0
        self._root = Path(run_dir) / SAMPLES_DIR
        self._prompts, self._latent, self._spec, self._codec = list(prompts), latent, spec, codec
        self._objective, self._options, self._keys, self._mesh = objective, options, keys, mesh
        self._shard = shards(latent)
        group, in_group = divmod(mesh.token_rank, len(self._shard.sizes))
        share = -(-len(prompts) // (mesh.token_ranks // len(self._shard.sizes)))
        # A group without a prompt draws the first one again: under ZeRO-3 every forward is a collective, so all ranks do as many.
        mine = list(range(len(prompts)))[group * share : (group + 1) * share]
        # All of a group have the whole videos in the end; the first writes them.
        self._written = mine if in_group == mesh.tp_rank == 0 else []
        self._drawn = mine or [0]
        self._texts = [texts[i] for i in self._drawn]
        self._noise_ids = [noise_ids(prompts)[i] for i in self._drawn]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="validation")
        self._pending: list[tuple[int, Future[None]]] = []
        self._unshown: list[int] = []

    def run(self, backend: ZeroBackend, ema: Ema, *, step: int) -> None:
        """Draws all prompts with the averaged weights. Collective."""
        for i in self._written:
            # Of a run that got here before it was killed. Gone before this call ends on any rank's main thread, and so before the
            # next collective: the main rank can't take them for this round's. What can't be removed can't be written either.
            with suppress(OSError):
                self._files(step)[i].unlink()
        with backend.inference(ema.shadow) as model:
            latents = generate_latents(
                model,
                noise_ids=self._noise_ids,
                texts=self._texts,
                latent=self._latent,
                spec=self._spec,
                objective=self._objective,
                options=self._options,
                keys=self._keys,
                device=self._mesh.device,
                shard=self._shard,
            )
        self._pending.append((step, self._pool.submit(self._write, latents, step)))
        self._unshown.append(step)

    def close(self) -> None:
        """Waits until everything is written, and reports what could not be."""
        self._pool.shutdown(wait=True)
        self.collect()

    def collect(self) -> None:
        """Reports failures of finished rounds; called at log steps and at the end."""
        done = [(step, future) for step, future in self._pending if future.done()]
        self._pending = [entry for entry in self._pending if entry not in done]
        for step, future in done:
            try:
                future.result()
            # A full disk, a codec's refusal, memory that a decoder lacks (a RuntimeError of torch): they cost videos, never the run.
            except (OSError, OpensoraError, RuntimeError, FFmpegError) as error:
                self.failures += 1
                self._unshown = [unshown for unshown in self._unshown if unshown != step]
                _log.warning("validation videos of step %d could not be written (%s); training goes on", step, error)

    def take_finished(self) -> list[tuple[int, list[Path]]]:
        """Rounds whose videos are all there, of every rank, and were not given out before: (step, files)."""
        # Every rank writes its rounds in order. So, asked newest first, a round that is not there when a later one is has failed on
        # another rank, and need not be asked for again.
        finished = sorted(step for step in reversed(self._unshown) if all(path.is_file() for path in self._files(step)))
        self._unshown = [step for step in self._unshown if step > max(finished, default=-1)]
        return [(step, self._files(step)) for step in finished]

    def _files(self, step: int) -> list[Path]:
        return [self._root / f"step-{step:08d}" / _file_name(i) for i in range(len(self._prompts))]

    def _write(self, latents: Tensor, step: int) -> None:
        files = self._files(step)
        if self._mesh.is_main:
            listing = [{"file": path.name, "prompt": p} for path, p in zip(files, self._prompts, strict=True)]
            write_json(files[0].with_name("index.json"), listing)
        if not self._written:
            return
        for i, frames in zip(self._written, to_frames(latents, spec=self._spec, codec=self._codec), strict=True):
            write_video(files[i], frames, fps=self._spec.fps)


def _file_name(index: int) -> str:
    return f"{index:03d}.mp4"
