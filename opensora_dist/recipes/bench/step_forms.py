"""Ways of computing the same step that a benchmark compares: what a run's ``kernels``, ``attention`` and ``compile`` choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.ops.choice import Choice, Compile, Kernels, choose, using
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.training import Training

_ASKED: dict[str, dict[str, Any]] = {
    "eager": {"kernels": "torch", "attention": "sdpa", "compile": "off"},
    "compile": {"kernels": "torch", "attention": "sdpa", "compile": "blocks"},
    "ours": {"kernels": "triton", "attention": "auto", "compile": "blocks"},
}
"""Settings of ``run``, as ``ops.choice.choose`` takes them."""


def case_of_form(case: MemoryCase, form: str) -> MemoryCase:
    """The case with the kernels that the form computes it by, whose formula of memory is another than torch's."""
    return replace(case, kernels=_ASKED[form]["kernels"])


def compiles(form: str) -> bool:
    """Whether a form has torch.compile make kernels of regions."""
    return bool(_ASKED[form]["compile"] != "off")


def form_of(kernels: Kernels, compile: Compile) -> str:
    """The form that is nearest to how a run computes: the same kernels first, then compiled or not."""
    return min(_ASKED, key=lambda form: (_ASKED[form]["kernels"] != kernels, compiles(form) != (compile != "off")))


def choice_of(form: str, *, device: torch.device, dtype: str) -> Choice:
    """What operators go by in a form.

    Args:
        dtype: ``run.dtype``.
    Raises:
        ConfigError: It can't be had on this machine.
    """
    return choose(**_ASKED[form], device=device, dtype=dtype)


def form_problems(forms: Sequence[str], *, device: torch.device, dtype: str) -> list[str]:
    """Why this machine can't run some of them."""
    problems = []
    for form in forms:
        try:
            choice_of(form, device=device, dtype=dtype)
        except ConfigError as error:
            problems += [f"--forms {form}: {problem}" for problem in error.problems]
    return problems


@contextmanager
def _chosen(training: Training, *, form: str) -> Iterator[None]:
    with using(choice_of(form, device=training.mesh.device, dtype=training.case.dtype)):
        with _own_sizes() if compiles(form) else nullcontext():
            yield


def _own_sizes() -> AbstractContextManager[object]:
    """Each case that is compiled is compiled for its sizes, as in a run of its own, and not for symbols as soon as there is a second."""
    patch: AbstractContextManager[object] = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    return patch


FORMS: dict[str, Callable[[Training], AbstractContextManager[object]]] = {name: partial(_chosen, form=name) for name in _ASKED}
"""What each changes of a training while its steps run. ``eager``: torch's operators one by one, torch's attention. ``compile``: the same
under ``run.compile=blocks``. ``ours``: this project's kernels (``run.kernels=triton``), the fastest attention that is here
(``run.attention=auto``), under ``run.compile=blocks``."""
