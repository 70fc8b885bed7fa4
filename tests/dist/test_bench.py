"""bench: every scheme of the registry is timed, after it was found to be right and to send what it says."""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from cli_process import cli
from rich.console import Console

from opensora_dist.cli.main import main
from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, TrainConfig
from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.types import Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.base import Traffic
from opensora_dist.parallel.sequence.network import measure_network, read_network
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.recipes.auto import auto_choice
from opensora_dist.recipes.bench import sequence
from opensora_dist.recipes.bench.case import SequenceCase, Subject
from opensora_dist.recipes.bench.figures import figures
from opensora_dist.recipes.bench.forms import PACKAGES, SilentExchange, package_missing
from opensora_dist.recipes.bench.passes import Pass, SequenceResult
from opensora_dist.recipes.bench.sequence import Options, bench_sequence, make_forms
from opensora_dist.recipes.bench.show import picture, print_table, record
from opensora_dist.recipes.bench.trace import hidden_under_products, in_lanes

CPU = torch.device("cpu")
TINY = SequenceCase(grid=Thw(4, 4, 3), width=32, heads=4, text_tokens=3)
QUICK = Options(rounds=2, warmup=0)


def _bench(case: SequenceCase, options: Options, trace: Path | None = None) -> list[SequenceResult]:
    return bench_sequence(case, device=CPU, options=options, trace=trace and trace / f"trace-{torch.distributed.get_rank()}.json")


@pytest.mark.parametrize("case", [TINY, dataclasses.replace(TINY, model="dit", recompute="full", batch=2)], ids=["stdit", "dit"])
def test_every_scheme_of_the_registry_has_a_row_with_the_bytes_of_its_formula(ranks, case):
    results = ranks.run(_bench, case, QUICK, world=2)[0]
    assert {r.scheme for r in results} == {*SCHEMES, *PACKAGES}
    for r in results:
        problems = (
            SCHEMES[r.scheme](SpConfig(degree=2)).problems(case.grid, size=2, heads=4, joint=case.model == "dit")
            if r.scheme in SCHEMES
            else []
        )
        if r.problem is not None:
            assert problems or package_missing(r.scheme), r
            continue
        assert len(r.passes) == 2 and r.difference < 1e-5 and r.memory_bytes > 0
        assert r.sent == r.formula and r.sent.forward > 0 and r.sent.backward > 0
        assert len(r.silent) == (2 if r.scheme in SCHEMES else 0)
        found = figures(r, results)
        assert found.both_ms.low <= found.both_ms.median <= found.both_ms.high


def test_what_a_rule_forbids_is_a_row_with_the_reason(ranks):
    case = dataclasses.replace(TINY, grid=Thw(5, 3, 2), width=36, heads=9)
    results = {
        r.scheme: r
        for r in ranks.run(_bench, case, Options(rounds=1, warmup=0, schemes=("ulysses", "ring", "deepspeed")), world=2)[0]
    }
    assert "heads=9" in results["ulysses"].problem
    assert results["ring"].problem is None and results["ring"].bytes_match
    if package_missing("deepspeed") is None:
        assert "heads" in results["deepspeed"].problem and "equal" in results["deepspeed"].problem


def test_on_one_rank_every_scheme_is_the_block_itself(ranks):
    results = ranks.run(_bench, TINY, QUICK, world=1)[0]
    assert [r.scheme for r in results] == ["none", *SCHEMES]
    assert all(r.sent == Traffic(forward=0, backward=0) and r.bytes_match and r.difference == 0 for r in results)
    assert figures(results[1], results).ratio is not None


def _silent_bytes() -> dict[str, int]:
    subject = Subject(TINY, device=CPU)
    found = {}
    for form in make_forms(TINY, device=CPU, options=QUICK)[0]:
        if form.silent is not None:
            x = subject.tokens("x", form.silent.region).requires_grad_()
            with SentBytes() as sent:
                subject.forward(x, form.silent).sum().backward()
            found[form.result.name] = sent.total
    return found


def test_a_form_without_communication_sends_nothing(ranks):
    for found in ranks.run(_silent_bytes, world=2):
        assert {name.split()[0] for name in found} == set(SCHEMES)
        assert not any(found.values()), found


def _wrong_scheme() -> str:
    made = SCHEMES["dsp"]

    def broken(sp: SpConfig):
        scheme = made(sp)
        scheme.branch = lambda attn, x, axis, shard, *, first, before, then: then(x, 0.0 * x)
        return scheme

    sequence.SCHEMES["dsp"] = broken
    try:
        with pytest.raises(OpensoraError) as caught:
            _bench(TINY, dataclasses.replace(QUICK, schemes=("dsp",)))
        return str(caught.value)
    finally:
        sequence.SCHEMES["dsp"] = made


def test_what_computes_something_else_is_not_timed(ranks):
    assert all(
        "dsp overlapped: output or gradients differ from one process" in said for said in ranks.run(_wrong_scheme, world=2)
    )


def _wrong_weight_gradient() -> str:
    """Tokens go the right way and their gradients back, but half of what the qkv weight should learn is lost."""
    made = SCHEMES["dsp"]

    def broken(sp: SpConfig):
        scheme = made(sp)
        branch = scheme.branch

        def halved(attn, *args, **options):
            projections = copy.copy(attn)
            projections._modules = dict(attn._modules)
            projections.qkv = copy.copy(attn.qkv)
            projections.qkv._parameters = dict(attn.qkv._parameters)
            weight = projections.qkv._parameters.pop("weight")
            projections.qkv.__dict__["weight"] = weight / 2 + weight.detach() / 2
            return branch(projections, *args, **options)

        scheme.branch = halved
        return scheme

    sequence.SCHEMES["dsp"] = broken
    try:
        with pytest.raises(OpensoraError) as caught:
            _bench(TINY, dataclasses.replace(QUICK, schemes=("dsp",)))
        return str(caught.value)
    finally:
        sequence.SCHEMES["dsp"] = made


def test_what_gives_a_weight_another_gradient_is_not_timed(ranks):
    for said in ranks.run(_wrong_weight_gradient, world=2):
        assert "output or gradients differ from one process by 0.5 " in said, said


def _silent_numbers() -> list[torch.Tensor]:
    exchange = SilentExchange(torch.distributed.group.WORLD)
    hole = torch.full((4, 3), torch.nan)
    parts = [hole.clone(), hole.clone()]
    exchange.gather(hole, parts=parts).wait()
    got = exchange.all_to_all(hole, send_rows=[2, 2], recv_rows=[1, 3]).wait()
    return [got, exchange.shift(hole, into=hole.clone()).wait(), parts[1 - exchange.rank]]


def test_what_a_silent_transfer_brings_is_neither_garbage_nor_zero(ranks):
    for brought in ranks.run(_silent_numbers, world=2):
        assert all(t.shape == (4, 3) and t.isfinite().all() and 0.3 < t.std() < 3 for t in brought), brought


def test_table_json_picture_and_trace(ranks, tmp_path):
    results = ranks.run(_bench, TINY, QUICK, tmp_path, world=2)[0]
    with open(tmp_path / "table.txt", "w") as file:
        print_table(TINY, results, world=2, console=Console(file=file))
    text = (tmp_path / "table.txt").read_text()
    made = json.loads(json.dumps(record(TINY, results, options=QUICK, world=2, peak_flops=1e9), allow_nan=False))
    svg = ET.fromstring(picture(TINY, results, world=2))
    labels = {e.text for e in svg.iter("{http://www.w3.org/2000/svg}text")}
    for r, row in zip(results, made["results"], strict=True):
        assert r.name in text
        assert row["name"] == r.name and (row["figures"] is None) == (r.problem is not None)
        assert (r.name in labels) == (r.problem is None)
    assert made["case"]["grid"] == [4, 4, 3] and made["environment"]["world"] == 2
    for rank in range(2):
        trace = json.loads((tmp_path / f"trace-{rank}.json").read_text())
        names = {e["name"] for e in trace["traceEvents"]}
        assert {"dsp overlapped forward", "dsp overlapped backward", "gloo:all_to_all"} <= names


def _overlap_seen_once(folder: Path) -> float:
    _bench(TINY, dataclasses.replace(QUICK, schemes=("dsp",)), folder)
    mine = json.loads((folder / f"trace-{torch.distributed.get_rank()}.json").read_text())
    return hidden_under_products(mine, form="dsp overlapped")


def test_a_trace_shows_transfers_under_products(ranks, tmp_path):
    """On a machine that does much else a transfer may be over before a product begins, but not every time."""
    tries = (ranks.run(_overlap_seen_once, tmp_path, world=2) for _ in range(5))
    assert any(all(hidden > 0 for hidden in found) for found in tries)


def test_transfers_of_a_trace_that_are_in_flight_together_have_a_track_each():
    def event(name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "name": name, "pid": 1, "tid": 7, "ts": ts, "dur": dur}

    trace = in_lanes(
        {
            "traceName": "/somewhere",
            "traceEvents": [
                event("gloo:send", 0, 10),
                event("gloo:recv", 5, 10),
                event("gloo:send", 12, 1),
                event("aten::mm", 2, 4),
                event("f forward", 0, 20),
            ],
        }
    )
    lanes = [e["tid"] for e in trace["traceEvents"] if e["name"].startswith("gloo:")]
    assert lanes[0] == lanes[2] != lanes[1] and 7 not in lanes
    assert "traceName" not in trace
    assert hidden_under_products(trace, form="f") == pytest.approx(4 / 15)


def _passes(seconds: float, wait: float) -> tuple[Pass, ...]:
    return tuple(
        Pass(forward_s=seconds * k, backward_s=2 * seconds * k, forward_wait_s=wait, backward_wait_s=wait) for k in (1, 1.1, 0.9)
    )


def test_figures_are_of_what_they_say():
    results = [
        SequenceResult(scheme="dsp", overlap=True, passes=_passes(1.2, 0.1), silent=_passes(1.0, 0)),
        SequenceResult(scheme="dsp", overlap=False, passes=_passes(2.0, 1.0), silent=_passes(1.1, 0)),
        SequenceResult(scheme="deepspeed", passes=_passes(2.4, 0)),
    ]
    found = figures(results[0], results)
    assert found.ratio.median == pytest.approx(0.5)
    assert found.exposed_forward_ms.median == pytest.approx(200) and found.exposed_backward_ms.median == pytest.approx(400)
    assert found.hidden["both"].wall == pytest.approx(1 - 0.2 / 1.0) and found.hidden["forward"].wait == pytest.approx(0.9)
    assert figures(results[1], results).hidden is None and figures(results[2], results).exposed_forward_ms is None


def _measure() -> tuple[object, ...]:
    mesh = build_mesh(CPU, dp_replicate=1, sp=SpConfig(degree=2), timeout_s=60)
    network = measure_network(mesh.links[2].sp, device=CPU, width=64, dtype=torch.float32).network
    config = TrainConfig(
        model=ModelConfig(depth=2, width=64, heads=4),
        parallel=ParallelConfig(sp=SpConfig(degree=2, scheme="auto", min_degree=1)),
    )
    with torch.device("meta"):
        model = build_model(config.model, ModelIo(in_channels=4, out_channels=4, text_width=8, max_tokens=6))
    choose = auto_choice(config, mesh, model, text_tokens=6)
    return network, [choose(grid) for grid in (Thw(4, 4, 4), Thw(1, 8, 8), Thw(16, 16, 16))], choose.networks


def test_ranks_measure_and_choose_the_same(ranks):
    first, second = ranks.run(_measure, world=2)
    assert first == second
    network, _, _ = first
    assert network.world == 2 and network.bytes_per_s > 0 and network.flops_per_s > 0 and network.latency_s > 0


def test_the_command_spawns_ranks_and_writes_what_it_found(tmp_path):
    out = tmp_path / "bench"
    words = "bench sequence --nproc 2 --grid 4x4x3 --width 32 --heads 4 --text-tokens 3 --rounds 1 --warmup 0 --schemes dsp ring --trace"
    done = cli(*words.split(), "--out", str(out))
    assert done.code == 0, done.err
    assert "dsp overlapped" in done.out and "ring blocking" in done.out
    assert json.loads((out / "sequence.json").read_text())["world"] == 2
    assert sorted(p.name for p in out.iterdir()) == ["logs", "sequence.json", "sequence.svg", "trace-0.json", "trace-1.json"]


def test_the_network_command_writes_what_auto_reads(tmp_path):
    done = cli(*["bench", "network", "--nproc", "2", "--width", "64", "--out"], str(tmp_path / "network.json"))
    assert done.code == 0, done.err
    assert read_network(tmp_path / "network.json").world == 2
    assert "latency" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--grid 4x4", "FRAMESxROWSxCOLUMNS"),
        ("--schemes warp --rounds 0 --width 30", "3 problems"),
        ("--trace", "--out"),
        ("--nproc 0 --timeout 0", "2 problems"),
        ("--nproc -2", "--nproc must be 1 or more"),
        ("--ulysses 3 --nproc 2 --schemes dsp", "--ulysses 3 must divide the 2 ranks; use one of 1, 2"),
    ],
)
def test_a_wrong_command_is_refused_before_any_rank_starts(words, said, capsys):
    assert main(["bench", "sequence", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_network_command_without_ranks_or_width_is_refused(capsys):
    assert main(["bench", "network", "--nproc", "0", "--width", "0", "--timeout", "nan"]) == 2
    assert "3 problems" in capsys.readouterr().err


def test_only_usp_is_given_an_inner_axis(ranks):
    options = dataclasses.replace(QUICK, schemes=("dsp", "usp"), sp=SpConfig.model_construct(**dict(SpConfig()) | {"ulysses": 2}))
    for results in ranks.run(_bench, TINY, options, world=2):
        assert all(r.problem is None for r in results)
