"""Packages of optional extras: asked for before work begins, rather than met as an import error in the middle of it."""

from __future__ import annotations

import importlib.util

from opensora_dist.core.errors import ConfigError


def missing_extra(module: str, *, extra: str, wanted_by: str) -> str | None:
    """What to say where a module of an extra isn't installed, or None where it is. Imports nothing.

    Args:
        module: As it is imported.
        extra: The extra of ours that brings it.
        wanted_by: What needs it, as the sentence's subject.
    """
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{wanted_by} needs the package {module}, which isn't installed; pip install 'opensora-dist[{extra}]'"


def require_extra(module: str, *, extra: str, wanted_by: str) -> None:
    """Refuses to go on without a module of an extra.

    Raises:
        ConfigError: Saying what to install.
    """
    said = missing_extra(module, extra=extra, wanted_by=wanted_by)
    if said is not None:
        raise ConfigError(said)
