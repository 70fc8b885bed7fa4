"""Fills in the templates of ``launch/``. What goes into shell or YAML goes through a filter that quotes it."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
"""A link to ``launch/`` in the source tree; the files themselves where this package is installed."""

_NOT_IN_YAML: Final = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def fill(name: str, **values: Any) -> str:
    """A template with values; ``{{ x|sh }}`` is one word of shell, ``{{ x|yaml }}`` a YAML scalar, list or mapping.

    A value that is missing, or an expression that is left bare, is an error of the template.
    """
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sh": _sh, "yaml": _yaml}
    return environment


def _sh(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_sh(v) for v in value)
    word = shlex.quote(str(value))
    # A comma between words of an array is most often a mistake, and shellcheck takes it for one.
    return f"'{word}'" if "," in word and word == str(value) else word


def _yaml(value: Any) -> str:
    """JSON is YAML, but for characters that YAML can't hold as they are, or reads as line breaks."""
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
