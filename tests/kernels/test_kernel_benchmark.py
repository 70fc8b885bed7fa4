"""What of the kernels' benchmark needs no GPU: its cases, its formulas of bytes, its table, and what it says where there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_dist.plan.hardware import gpu_of

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("benchmark_of_kernels", ROOT / "benchmarks/kernels.py")
assert _spec is not None and _spec.loader is not None
bench = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

TINY = bench.Shape(name="tiny", batch=2, frames=2, places=3, width=32, heads=2, text_tokens=2)


@pytest.mark.parametrize("name", bench.KERNELS)
def test_a_case_compares_a_kernel_with_a_reference_that_gives_the_same(name):
    inputs, ours, theirs = bench.KERNELS[name].prepare(TINY, torch.device("cpu"))
    assert 0 < bench.difference(ours, theirs, inputs) <= bench.LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", bench.KERNELS)
def test_the_bytes_of_a_forward_are_those_of_the_tokens_that_go_in_and_come_out(name):
    inputs, ours, _ = bench.KERNELS[name].prepare(TINY, torch.device("cpu"))
    outs, _ = bench.call(ours, inputs)
    of_tokens = [t for t in (*inputs, *outs) if t.numel() >= TINY.tokens * TINY.width]
    assert sum(t.numel() * t.element_size() for t in of_tokens) == bench.KERNELS[name].bytes_moved(TINY)[0]


@pytest.mark.parametrize("name", ["norm_modulate", "gated", "add_norm_modulate", "bias_gelu"])
def test_the_bytes_of_a_backward_are_those_of_gradients_and_of_what_was_kept_for_it(name):
    inputs, ours, _ = bench.KERNELS[name].prepare(TINY, torch.device("cpu"))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs, grads = bench.call(ours, inputs)
    moved = {t.data_ptr(): t for t in (*kept, *grads, *torch.autograd.grad(outs, inputs, grads))}  # once, whoever names it
    of_tokens = [t for t in moved.values() if t.numel() >= TINY.tokens * TINY.width]
    assert sum(t.numel() * t.element_size() for t in of_tokens) == bench.KERNELS[name].bytes_moved(TINY)[1]


def case(kernel: str, *, ours: float, compiled: float, eager: float = 4.0) -> dict:
    times = {form: [[s, 2 * s]] * 5 for form, s in (("eager", eager), ("compile", compiled), ("ours", ours))}
    return {"kernel": kernel, "shape": {"name": "tiny"}, "bytes": [1_000_000_000, 4_000_000_000], "times": times}


def test_a_kernel_is_kept_where_it_is_the_faster_one_at_every_shape():
    faster, slower = case("gated", ours=1.0, compiled=2.0), case("gated", ours=3.0, compiled=2.0)
    assert bench.verdict([faster, faster]) == "keep" and bench.verdict([faster, slower]) == "drop"


def test_the_table_has_rates_shares_ratios_and_a_verdict():
    record = {"gpu": "NVIDIA H100", "memory_bytes_per_s": 4e9, "rounds": 5, "cases": [case("gated", ours=1.0, compiled=2.0)]}
    *_, row = bench.results_table(record).splitlines()
    wanted = "gated | tiny | 1e+03 | 1 | 25% | 2e+03 | 2 | 50% | 0.25 [0.25, 0.25] | 0.50 [0.50, 0.50] | keep"
    assert row.strip("| ").replace("1000", "1e+03").replace("2000", "2e+03") == wanted


def _not_its_reference(shape, device):
    inputs = bench._tokens(shape, device, torch.float32)
    return inputs, lambda x: 2 * x, lambda x: x


def _no_number(shape, device):
    inputs = bench._tokens(shape, device, torch.float32, torch.float32)
    return inputs, lambda x, y: (x, y * torch.nan), lambda x, y: (x, 1 * y)


def _out_of_memory(shape, device):
    raise torch.OutOfMemoryError("out of | memory\nmore")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_not_its_reference, "off its reference by 1"),
        (_no_number, "off its reference by nan"),
        (_out_of_memory, "OutOfMemoryError: out of / memory"),
    ],
)
def test_a_kernel_that_is_off_its_reference_or_fails_is_a_row_that_drops_it(prepare, said, monkeypatch):
    monkeypatch.setitem(bench.KERNELS, "gated", dataclasses.replace(bench.KERNELS["gated"], prepare=prepare))
    failed = bench.measure("gated", TINY, device=torch.device("cpu"), rounds=5, calls=1)
    assert "times" not in failed and bench.verdict([case("gated", ours=1.0, compiled=2.0), failed]) == "drop"
    record = {"gpu": "NVIDIA H100", "memory_bytes_per_s": 4e9, "rounds": 5, "cases": [failed]}
    row = bench.results_table(record).splitlines()[-1]
    assert row.startswith("| gated | tiny | - |") and f"drop: {said}" in row and row.count("|") == 12


@pytest.mark.parametrize("wrong", [False, True])
def test_a_stored_record_is_shown_without_a_gpu(tmp_path, monkeypatch, capsys, wrong):
    cases = [case("gated", ours=1.0, compiled=2.0)]
    cases += [{**case("bias_gelu", ours=1.0, compiled=2.0), "error": "wrong"}] if wrong else []
    stored = {"gpu": "NVIDIA H100", "memory_bytes_per_s": 4e9, "rounds": 5, "cases": cases}
    (tmp_path / "kernels.json").write_text(json.dumps(stored))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--from", str(tmp_path / "kernels.json")])
    assert bench.main() == wrong
    assert bench.results_table(stored) in capsys.readouterr().out


def test_each_case_is_written_when_it_is_measured(tmp_path, monkeypatch):
    """With a GPU that is pretended, and measurements that are made up."""
    written = []
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--kernels", "gated", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "about", lambda _world: {})
    monkeypatch.setattr(bench, "measure", lambda kernel, *_args, **_more: case(kernel, ours=1.0, compiled=2.0))
    monkeypatch.setattr(bench, "write_json", lambda path, record: written.append((path, len(record["cases"]))))
    with torch._functorch.config.patch(donated_buffer=True):  # whose attributes a monkeypatch doesn't put back
        assert bench.main() == 0
    assert written == [(tmp_path / "h100/kernels.json", done) for done in (1, 2, 3)]


def test_the_limits_of_the_docs_are_what_the_formulas_give():
    assert bench.limits_table(bytes_per_s=gpu_of("h100").memory_bytes_per_s) in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it where torch sees none")
def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert bench.main() == 2
    said = capsys.readouterr().err
    assert "none here" in said and len(said.splitlines()) == 1
