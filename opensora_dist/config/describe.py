"""A config schema as text for ``--help``: every key, its default and what it means, from the one place they are written."""

from __future__ import annotations

import textwrap
from typing import Any

from opensora_dist.config.base import Section
from opensora_dist.config.load import _variants


def describe(schema: type[Section]) -> str:
    """One line per key, sections as headings."""
    lines: list[str] = []
    for name, field in schema.model_fields.items():
        variants = _variants(field.annotation)
        if not variants:
            lines += _line(name, field.get_default(call_default_factory=True), field.description)
            continue
        for variant in variants:
            which = f" (name: {variant.model_fields['name'].default})" if len(variants) > 1 else ""
            lines += ["", f"{name}:{which}  {variant.__doc__ or ''}".rstrip()]
            lines += _keys(variant, prefix="  ")
    return "\n".join(lines).lstrip("\n")


def _keys(schema: type[Section], *, prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in schema.model_fields.items():
        variants = _variants(field.annotation)
        if variants:
            note = "" if field.is_required() or field.default is not None else "  (default: none)"
            lines.append(f"{prefix}{name}:{note}  {field.description or variants[0].__doc__ or ''}".rstrip())
            lines += _keys(variants[0], prefix=prefix + "  ")
        elif field.is_required():
            lines += _line(prefix + name, "(required)", field.description)
        else:
            lines += _line(prefix + name, field.get_default(call_default_factory=True), field.description)
    return lines


def _line(name: str, default: Any, description: str | None) -> list[str]:
    shown = {None: "none", True: "true", False: "false"}.get(default) if default is None or isinstance(default, bool) else default
    if isinstance(shown, tuple):
        shown = list(shown)
    head = f"{name}: {shown}"
    if not description:
        return [head]
    return textwrap.wrap(f"{head:<30}  {description}", width=118, subsequent_indent=" " * 32, break_on_hyphens=False)
