"""The base of every config model: frozen, unknown keys refused, text that ``--help`` can show."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a config. Values can't be changed after loading; unknown keys are problems, not extras."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
