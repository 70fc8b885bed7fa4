"""Laws of the code that no linter's option expresses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
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


def test_an_installed_copy_has_every_launch_template(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True, timeout=60)
    source, built = PACKAGE.parent / "launch", tmp_path / "opensora_dist/launch/templates"
    files = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    assert {p.relative_to(built): p.read_bytes() for p in built.rglob("*") if p.is_file()} == files and files


# Draws of torch, as functions and in place. `parallel.keys` is no exception: a draw without a generator is keyed by nothing.
_DRAWS = {
    *("torch." + n for n in ("rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial", "poisson")),
    *("torch." + n for n in ("rand_like", "randn_like", "randint_like")),
}
_IN_PLACE_DRAWS = re.compile(
    r"(normal|uniform|random|bernoulli|exponential|cauchy|geometric|log_normal|trunc_normal|orthogonal|sparse"
    r"|(xavier|kaiming)_(normal|uniform))_"
)
# What a keyword may be, where it is given.
_HARMLESS = {"weights_only": "True", "allow_pickle": "False", "trust_remote_code": "False", "shell": "False"}


def _breaches(source):
    """Calls that would unpickle, run or extract what was read, and draws that no key determines."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        method = name.rpartition(".")[2] if "." in name else ""
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        bad = (
            name in ("eval", "exec")
            or method in ("extract", "extractall")
            or re.search(r"_object(_list)?$", method)  # of torch.distributed: they pickle
            or (name == "torch.load" and "weights_only" not in given)
            or any(given.get(keyword, value) != value for keyword, value in _HARMLESS.items())
            or ((name in _DRAWS or _IN_PLACE_DRAWS.fullmatch(method)) and given.get("generator", "None") == "None")
        )
        if bad:
            found.append(ast.unparse(call))
    return found


def test_data_is_never_run_or_extracted_and_every_draw_is_keyed():
    guilty = [f"{f.relative_to(PACKAGE)}: {call}" for f in sorted(PACKAGE.rglob("*.py")) for call in _breaches(f.read_text())]
    assert not guilty


@pytest.mark.parametrize(
    "call",
    [
        "eval(text)",
        "exec(text)",
        "tar.extractall(folder, filter='data')",
        "dist.all_gather_object(found, mine)",
        "dist.broadcast_object_list(objects, src=0)",
        "tar.extract(member)",
        "torch.load(path)",
        "torch.load(path, **options)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=strict)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "torch.normal(0.0, 1.0, shape)",
        "torch.multinomial(weights, 1)",
        "torch.randn(shape, generator=None)",
        "torch.empty(3).normal_()",
        "x.random_(0, 9)",
        "nn.init.xavier_uniform_(weight)",
    ],
)
def test_the_law_of_calls_sees(call):
    assert _breaches(call) == [call]


@pytest.mark.parametrize(
    "call",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.save(file, array, allow_pickle=False)",
        "torch.randn(shape, generator=g)",
        "x.normal_(std=0.1, generator=keys.generator('noise'))",
        "nn.init.xavier_uniform_(weight, generator=g)",
    ],
)
def test_the_law_of_calls_lets_pass(call):
    assert not _breaches(call)
