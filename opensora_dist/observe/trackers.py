"""Weights & Biases and TensorBoard, both optional: metrics.jsonl is the record, these are views of it."""

from __future__ import annotations

import importlib
import io
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image

from opensora_dist.config.load import Problem
from opensora_dist.config.train import TrackConfig, WandbConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.extras import missing_extra
from opensora_dist.core.io import write_text
from opensora_dist.core.logging import get_logger
from opensora_dist.core.video import read_video

_log = get_logger(__name__)


class Tracker(Protocol):
    """A place that shows metrics and videos."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers of one step."""
        ...

    def log_video(self, step: int, name: str, path: Path) -> None:
        """Shows an mp4 file; ``name`` is the same at each step, so that videos can be compared."""
        ...

    def close(self) -> None:
        """Hands over what is left."""
        ...


class WandbTracker:
    """Weights & Biases. Files go under ``<run>/wandb``; a resumed run goes on in the same W&B run.

    Raises:
        ConfigError: wandb can't be imported.
    """

    name = "wandb"

    def __init__(self, config: WandbConfig, *, run_dir: Path, run_name: str, config_dump: Mapping[str, Any]) -> None:
        self._wandb = _import("wandb", field=f"track.wandb.mode={config.mode}")
        self._run = self._wandb.init(
            project=config.project,
            name=run_name,
            id=_run_id(run_dir / "wandb" / "run_id"),
            resume="allow",
            dir=str(run_dir),
            mode=config.mode,
            config=dict(config_dump),
            settings=self._wandb.Settings(silent=True),
        )
        # Its own step counter refuses to go back, which a run resumed from an older checkpoint has to.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        self._run.log({**values, "step": step})

    def log_video(self, step: int, name: str, path: Path) -> None:
        """See ``Tracker``."""
        self._run.log({name: self._wandb.Video(str(path), format="mp4"), "step": step})

    def close(self) -> None:
        """See ``Tracker``."""
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files under ``<run>/tensorboard``.

    Raises:
        ConfigError: tensorboard can't be imported.
    """

    name = "tensorboard"

    def __init__(self, *, run_dir: Path, steps_done: int) -> None:
        field = "track.tensorboard=true"
        _import("tensorboard", field=field)
        self._summary = _import("tensorboard.compat.proto.summary_pb2", field=field)
        writer = _import("torch.utils.tensorboard", field=field)
        # Steps that the interrupted run logged after its last checkpoint are hidden.
        self._writer = writer.SummaryWriter(
            log_dir=str(run_dir / "tensorboard"), purge_step=steps_done + 1 if steps_done else None
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_video(self, step: int, name: str, path: Path) -> None:
        """See ``Tracker``. As an animated GIF, which is what TensorBoard plays; ``add_video`` would want moviepy to make one."""
        frames, fps = read_video(path)
        buffer = io.BytesIO()
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        _, height, width, _ = frames.shape
        image = self._summary.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
        summary = self._summary.Summary(value=[self._summary.Summary.Value(tag=name, image=image)])
        self._writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """See ``Tracker``."""
        self._writer.close()


class Trackers:
    """All trackers of a run as one. What fails in one of them is said once, counted, and never ends the run.

    Args:
        trackers: Any number, none included.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self.failures: dict[str, int] = {t.name: 0 for t in trackers}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers of one step."""
        self._each(lambda t: t.log(step, values))

    def log_video(self, step: int, name: str, path: Path) -> None:
        """Shows an mp4 file."""
        self._each(lambda t: t.log_video(step, name, path))

    def close(self) -> None:
        """Hands over what is left, and says what was lost."""
        self._each(lambda t: t.close())
        for name, count in self.failures.items():
            if count:
                _log.warning("tracker %s failed %d times; metrics.jsonl has everything", name, count)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001
                # Foreign code and a network: anything can come, and none of it is worth a run. Counted, and said at the end.
                self.failures[tracker.name] += 1
                if self.failures[tracker.name] == 1:
                    _log.warning("tracker %s failed (%s: %s); the run goes on", tracker.name, type(error).__name__, error)


def track_problems(config: TrackConfig) -> list[Problem]:
    """What the trackers of a config lack here: a package, or W&B's key. Imports nothing."""
    wandb = f"track.wandb.mode={config.wandb.mode}"
    problems: list[Problem] = []
    for field, wanted_by, package, on in (
        ("track.tensorboard", "track.tensorboard=true", "tensorboard", config.tensorboard),
        ("track.wandb.mode", wandb, "wandb", config.wandb.mode != "off"),
    ):
        lacking = missing_extra(package, extra="track", wanted_by=wanted_by) if on else None
        if lacking:
            problems.append(Problem(fields=(field,), message=f"{lacking}, or turn it off", here=True))
    if config.wandb.mode == "online" and not os.environ.get("WANDB_API_KEY"):
        message = f"{wandb} needs WANDB_API_KEY in the environment; set it, or use offline and `wandb sync` later"
        problems.append(Problem(fields=("track.wandb.mode",), message=message, here=True))
    return problems


def build_trackers(
    config: TrackConfig, *, run_dir: Path, run_name: str, config_dump: Mapping[str, Any], steps_done: int = 0
) -> Trackers:
    """The trackers that a config asks for. Called on rank 0 only.

    Args:
        run_dir: Everything they write lies in it.
        run_name: ``run.name``.
        config_dump: The resolved config as JSON values, for display.
        steps_done: Step the run goes on from.
    Raises:
        ConfigError: A package or a key is missing.
    """
    problems = track_problems(config)
    if problems:
        raise ConfigError(p.message for p in problems)
    run_dir = Path(run_dir)
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorboardTracker(run_dir=run_dir, steps_done=steps_done))
    if config.wandb.mode != "off":
        trackers.append(WandbTracker(config.wandb, run_dir=run_dir, run_name=run_name, config_dump=config_dump))
    return Trackers(trackers)


def _import(name: str, *, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0] if not name.startswith("torch.") else "tensorboard"
        raise ConfigError(
            f"{field} needs the package {package} ({error}); pip install 'opensora-dist[track]', or turn it off"
        ) from error


def _run_id(path: Path) -> str:
    """The run's id at W&B, made once and kept in the run directory."""
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text().strip()
