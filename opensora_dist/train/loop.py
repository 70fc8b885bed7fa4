"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.data.loader import Loader, MicroBatch, StepData
from opensora_dist.diffusion.base import Objective
from opensora_dist.parallel.failures import is_lost_contact
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.resilience.endings import Ended, Ending, note_ending, note_error
from opensora_dist.resilience.signals import StopAgreement, StopFlag, clear_marker, write_marker
from opensora_dist.train.callbacks import Callback
from opensora_dist.train.ema import Ema
from opensora_dist.train.logbook import Logbook, StepNote
from opensora_dist.train.saving import SaveOutcome, Saver, TrainerState
from opensora_dist.train.schedule import learning_rate
from opensora_dist.train.step import train_step
from opensora_dist.train.validation import Validator

_log = get_logger(__name__)
_LEAVE_S, _SLOW_S = 30.0, 1.0


@dataclass(frozen=True, kw_only=True)
class BatchCost:
    """What a sample of a shape costs: tokens and model FLOPs, forward and backward."""

    tokens: int
    flops: int


class Trainer:
    """Runs a training from a state to its last step, or until it is asked to stop.

    ``left_out`` counts the samples that no pack of their step had room for, since the start.

    Args:
        state: Where to start; step 0, or what a checkpoint held.
        make_loader: Opens the loader at a step.
        shards: This rank's part of samples of a latent shape.
        agree: Fails, on all of them, where the ranks that share the samples of what is run at once are about to do different things;
            returns it with substitutes for samples that one of them could not read. Collective over these ranks.
        cost: Tokens and FLOPs of one sample of a latent shape with a number of text tokens.
        budget_tokens: Tokens that a step has room for; None where it has as many as its samples have.
        validator: Draws videos; None draws none.
        callback: Called at the loop's edges.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        run_dir: Path,
        mesh: Mesh,
        keys: Keys,
        backend: ZeroBackend,
        ema: Ema,
        objective: Objective,
        state: TrainerState,
        make_loader: Callable[[int], Loader],
        shards: Callable[[Thw], Shard],
        agree: Callable[[StepData, Sequence[MicroBatch]], list[MicroBatch]],
        cost: Callable[[Thw, int], BatchCost],
        budget_tokens: int | None,
        saver: Saver,
        validator: Validator | None,
        logbook: Logbook,
        callback: Callback,
    ) -> None:
        self.config, self.run_dir, self.mesh, self.keys = config, run_dir, mesh, keys
        self.backend, self.ema, self.objective, self.state = backend, ema, objective, state
        self.make_loader, self.shards, self.agree, self.cost = make_loader, shards, agree, cost
        self.budget_tokens = budget_tokens
        self.saver, self.validator, self.logbook, self.callback = saver, validator, logbook, callback
        self._saved_step = state.step
        self._edge_s = 0.0
        self.left_out = 0

    def run(self) -> TrainerState:
        """Trains; returns the state reached. Collective."""
        steps = self.config.run.steps
        with StopFlag() as flag, self.make_loader(self.state.step) as loader:
            if self.mesh.is_main:
                clear_marker(self.run_dir)
            agreement = StopAgreement(self.mesh.control)
            self.callback.start(step=self.state.step)
            try:
                self._edge_s = time.perf_counter()
                for data in loader:
                    self.callback.phase("step")
                    self._step(data, wait_s=loader.last_wait_s)
                    if self.state.step % self.config.run.log_every == 0:
                        self._log()
                    self._validate_if_due()
                    self._note_save(self.saver.poll())
                    self._save_if_due()
                    if agreement.agree(flag.requested) and self.state.step < steps:
                        self._stop(flag.signal_name)
                        break
                    self.callback.phase("data")
                agreement.close()
                self._flush()
                # Inside the flag's block: a signal in the middle of the last save must not cost it.
                if self.state.step == steps:
                    self.save(required=True)
            except Exception as error:
                note_error(error)  # first: what follows may wait, and others end this process meanwhile
                self._leave(error)
                raise
            finally:
                self.callback.end()
        return self.state

    def _log(self) -> None:
        with self._off_the_clock():
            self._flush()
            self._collect_videos()

    def _flush(self) -> None:
        self.callback.phase("log")
        self.callback.after_flush(self.logbook.flush())

    def _step(self, data: StepData, *, wait_s: float) -> None:
        self.callback.before_step(data)
        lr = learning_rate(data.step, self.config.optim, steps=self.config.run.steps)
        result = train_step(
            self.backend,
            data,
            objective=self.objective,
            keys=self.keys,
            shards=self.shards,
            agree=partial(self.agree, data),
            lr=lr,
            clip_norm=self.config.optim.clip_norm,
        )
        self.ema.update(step=data.step, skipped=self.backend.skipped())
        self.left_out += data.left_out
        text_tokens = data.micros[0].text_BYE.shape[1]
        costs = [(count, self.cost(latent, text_tokens)) for latent, count in data.shapes.items()]
        samples, tokens = sum(data.shapes.values()), sum(count * cost.tokens for count, cost in costs)
        self.state = TrainerState(
            step=data.step + 1,
            optimizer_steps=0,  # read from the device when it is saved
            samples=self.state.samples + samples,
            tokens=self.state.tokens + tokens,
            seed=self.state.seed,
            dataset_hash=self.state.dataset_hash,
        )
        now = time.perf_counter()
        note = StepNote(
            step=self.state.step,
            lr=lr,
            shapes=tuple(data.shapes),
            samples=samples,
            tokens=tokens,
            budget_tokens=self.budget_tokens,
            flops=sum(count * cost.flops for count, cost in costs),
            step_s=now - self._edge_s,
            data_wait_s=wait_s,
            epoch=data.epoch,
            digest=data.digest,
            bad_samples=sum(micro.replaced for micro in data.micros),
            left_out=data.left_out if self.config.data.batching == "packed" else None,
            result=result,
        )
        self.logbook.add(note)
        self.callback.after_step(note)
        self._edge_s = now

    def save(self, *, required: bool) -> None:
        """Commits a checkpoint of this step, unless it has one. Collective.

        A save that fails is loud, and the run goes on to the next one, except where this was the last chance (``required``); only
        there the write is waited for.
        """
        self.callback.phase("save")
        # Two saves are never under way at once. Every rank waits here, so that all know the same of the last one.
        began = time.perf_counter()
        self._note_save(self.saver.wait())
        waited_s = time.perf_counter() - began
        if waited_s > _SLOW_S and not required:
            said = (
                "training waited %.1f s for the last checkpoint to be written; raise checkpoint.every_steps, or use a faster disk"
            )
            _log.warning(said, waited_s)
        if self._saved_step == self.state.step:
            return
        self._flush()  # or the metrics of the steps up to here would be lost with a kill after this save
        self.callback.phase("save")
        self.callback.before_save(step=self.state.step)
        self.saver.begin(self.backend, self.ema, replace(self.state, optimizer_steps=self.backend.optimizer_steps()))
        if required:
            outcome = self.saver.wait()
            self._note_save(outcome)
            if outcome is not None and outcome.error is not None:
                raise outcome.error

    def _note_save(self, outcome: SaveOutcome | None) -> None:
        """Says how a save ended, and raises what is no matter of a checkpoint. Not collective."""
        if outcome is not None:
            self._say(outcome)
            if outcome.error is not None and not isinstance(outcome.error, CheckpointError):
                raise outcome.error

    def _say(self, outcome: SaveOutcome) -> None:
        if outcome.path is not None:
            self._saved_step = outcome.step
            took = {"seconds": outcome.seconds, "stall_s": outcome.stall_s}
            self.logbook.event("checkpoint", step=outcome.step, path=outcome.path.name, **took)
            return
        assert outcome.error is not None
        self.logbook.event("checkpoint_failed", step=outcome.step, error=str(outcome.error))
        _log.error("%s", outcome.error)

    def _save_if_due(self) -> None:
        if self.state.step % self.config.checkpoint.every_steps == 0:
            with self._off_the_clock():
                self.save(required=False)

    def _validate_if_due(self) -> None:
        every = self.config.validation.every_steps
        if self.validator is not None and every and self.state.step % every == 0:
            with self._off_the_clock():
                self.callback.phase("validation")
                self.validator.run(self.backend, self.ema, step=self.state.step)
            self.logbook.event("validation", step=self.state.step)

    def _collect_videos(self) -> None:
        if self.validator is not None:
            self.validator.collect()
            self.logbook.show_videos(self.validator.take_finished())

    def _stop(self, signal_name: str | None) -> None:
        """Saves, and leaves the marker that tells a launcher to start the run again."""
        self.save(required=True)
        self.logbook.event("stopped", step=self.state.step, signal=signal_name)
        if self.mesh.is_main:
            write_marker(self.run_dir, step=self.state.step, signal_name=signal_name)
        note_ending(Ended(ending=Ending.STOPPED, said=f"saved step {self.state.step}", signal=signal_name))
        _log.warning("stopped on request after step %d; start the same command again to go on", self.state.step)

    def _leave(self, error: Exception) -> None:
        """Gives a write that is under way the time to end, unless a rank is lost: it has the last steps, and ends with this process."""
        if is_lost_contact(error):
            return
        if (outcome := self.saver.wait(limit_s=_LEAVE_S)) is not None:
            self._say(outcome)
        elif (step := self.saver.under_way) is not None:
            said = f"not written {_LEAVE_S:.0f} s after the run's own error, so given up"
            self.logbook.event("checkpoint_failed", step=step, error=said)
            _log.error("the checkpoint of step %d was %s", step, said)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Time spent here is not a step's: speed is the speed of training."""
        began = time.perf_counter()
        yield
        self._edge_s += time.perf_counter() - began
