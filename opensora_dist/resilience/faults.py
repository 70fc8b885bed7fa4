"""Faults on purpose, for drills and tests: what ``fault.*`` of a config asks for, each once in a run directory.

Nothing here runs in a step unless a fault is due in it. A fault leaves a file under ``run_dir/faults/`` before it happens, on the disk's
side of the process, so that the run that is started again doesn't meet it again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from opensora_dist.config.faults import AtStep, Fault, InSave, Slower, parse_fault
from opensora_dist.config.train import FaultConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.logging import get_logger

FAULTS_DIR: Final = "faults"
_IN_FORWARD: Final = ("kill_rank", "hang_rank", "nan_loss")
_BIT: Final = 1 << 12
_log = get_logger(__name__)
_F = TypeVar("_F", bound=Fault)


class Faults:
    """What goes wrong on this rank, and when.

    Args:
        config: What to inject; checked with the rest of the config.
        run_dir: The run directory.
        rank: This rank.
    """

    def __init__(self, config: FaultConfig, *, run_dir: Path, rank: int) -> None:
        self._dir, self._rank = Path(run_dir) / FAULTS_DIR, rank
        self.asked: dict[str, str] = {name: text for name, text in config.model_dump().items() if text is not None}
        parsed = {name: parse_fault(name, text) for name, text in self.asked.items()}
        self._faults = {name: fault for name, fault in parsed.items() if fault is not None and fault.rank == rank}
        self._hook: Any = None

    def arm(self, model: nn.Module, *, step: int) -> None:
        """Before step ``step`` (from 1): a fault that is due in it happens after the model's next forward."""
        due = [name for name in _IN_FORWARD if self._due(name, step=step) and self._first(name)]
        if due:
            self._hook = model.register_forward_hook(lambda _module, _args, output: self._strike(due, output))

    def disarm(self, weights: Mapping[str, Tensor], *, step: int) -> None:
        """After step ``step``: ``fault.flip_bit``.

        Args:
            weights: This rank's, live.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._due("flip_bit", step=step) and self._first("flip_bit"):
            _flip_bit(next(w for w in weights.values() if w.numel()))

    def slow_down(self, module: nn.Module) -> None:
        """``fault.slow_rank``: every forward of ``module`` takes as many times as long, in this start and in every later one."""
        fault = self._get("slow_rank", Slower)
        if fault is not None:
            _Slowness(module, factor=fault.factor)

    def save_phase(self, name: str) -> None:
        """A save comes to its phase ``name``: ``fault.kill_in_save``."""
        fault = self._get("kill_in_save", InSave)
        if fault is not None and fault.phase == name and self._first("kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)

    def bad_sample(self, step: int) -> bool:
        """Whether the first sample of ``step`` (``StepData.step``, from 0) is to read as damaged: ``fault.bad_sample``."""
        return self._due("bad_sample", step=step + 1) and self._first("bad_sample")

    def _strike(self, due: list[str], output: Tensor) -> Tensor:
        if "kill_rank" in due:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang_rank" in due:
            Event().wait()
        return output * float("nan")

    def _due(self, name: str, *, step: int) -> bool:
        fault = self._get(name, AtStep)
        return fault is not None and fault.step == step

    def _get(self, name: str, kind: type[_F]) -> _F | None:
        fault = self._faults.get(name)
        assert fault is None or isinstance(fault, kind), (name, fault)
        return fault

    def _first(self, name: str) -> bool:
        """Notes that a fault happens now, unless it has happened before."""
        marker = self._dir / f"{name}-rank-{self._rank}.json"
        if marker.exists():
            return False
        write_json(marker, {"fault": name, "asked": self.asked[name], "rank": self._rank})
        _log.warning("fault.%s=%s happens now, on rank %d", name, self.asked[name], self._rank)
        return True


@torch.no_grad()
def _flip_bit(weight: Tensor) -> None:
    """One bit of the mantissa of the first element."""
    bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int64)
    bits[(0,) * bits.ndim] ^= _BIT


class _Slowness:
    """Hooks that make a module's forward take longer: a CPU is kept busy, since short sleeps are not exact; a GPU runs it again.

    Compiled graphs are what they are without: a compiler can't follow a clock.
    """

    def __init__(self, module: nn.Module, *, factor: float) -> None:
        self._factor, self._began = factor, 0.0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, _module: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._began = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._take_longer(module, args, output)

    @torch.no_grad()
    def _take_longer(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.device.type == "cuda":
            for _ in range(round(self._factor) - 1):
                module.forward(*args)
        else:
            until = self._began + self._factor * (time.perf_counter() - self._began)
            while time.perf_counter() < until:
                pass
