"""What may be done at the edges of a training, beside the training itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opensora_dist.data.loader import StepData
from opensora_dist.train.logbook import LoggedStep, StepNote


class Callback:
    """Called by the loop on every rank, in the same order, at the same steps; so collective calls may be made in any method.

    Every method does nothing here. An exception ends the run, on this rank; raise it on all ranks alike.
    """

    def start(self, *, step: int) -> None:
        """Once, before the first step; ``step`` optimizer steps are done."""

    def phase(self, name: str) -> None:
        """The loop turns to something else: ``data``, ``step``, ``log``, ``validation``, ``save``."""

    def before_step(self, data: StepData) -> None:
        """Before the forward of a step."""

    def after_step(self, note: StepNote) -> None:
        """After a step, without a wait for the device."""

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        """At log steps and before a save: what is known of the steps since the last call, the same on every rank."""

    def before_save(self, *, step: int) -> None:
        """Before a checkpoint is made of the state after ``step`` steps."""

    def end(self) -> None:
        """Once, after the last step, or while an error leaves the loop; not collective."""


@dataclass(frozen=True)
class Callbacks(Callback):
    """Several as one, called in order."""

    parts: Sequence[Callback]

    def start(self, *, step: int) -> None:
        for part in self.parts:
            part.start(step=step)

    def phase(self, name: str) -> None:
        for part in self.parts:
            part.phase(name)

    def before_step(self, data: StepData) -> None:
        for part in self.parts:
            part.before_step(data)

    def after_step(self, note: StepNote) -> None:
        for part in self.parts:
            part.after_step(note)

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        for part in self.parts:
            part.after_flush(steps)

    def before_save(self, *, step: int) -> None:
        for part in self.parts:
            part.before_save(step=step)

    def end(self) -> None:
        for part in self.parts:
            part.end()
