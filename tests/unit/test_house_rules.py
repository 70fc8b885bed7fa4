"""Laws of the code that no linter's option expresses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import opensora_dist

PACKAGE = Path(opensora_dist.__file__).parent


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("room", ["config", "core", "data", "diffusion", "models/stdit", "models/dit", "observe", "codecs"])
def test_a_room_that_computes_or_reads_knows_nothing_of_process_groups(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    guilty = [f"{f.relative_to(PACKAGE)}: {name}" for f in files for name in _imports(f) if name.startswith("torch.distributed")]
    assert not guilty


def test_every_module_says_what_it_is_for():
    silent = [str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if not ast.get_docstring(ast.parse(f.read_text()))]
    assert silent in ([], ["__main__.py"])
