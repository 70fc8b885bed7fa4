"""auto: what it predicts, what it picks, and that it picks the same everywhere."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from opensora_dist.config.train import ModelConfig, SpConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.sequence.auto import AutoChoice, StepWatch
from opensora_dist.parallel.sequence.layout import cut
from opensora_dist.parallel.sequence.network import Network, fit_line, read_network, unfit, write_network
from opensora_dist.parallel.sequence.predict import _TRIPS, Workload, _bytes, _chunks, _pieces, _shards, predict
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.recipes.auto import sample_cost
from opensora_dist.train.logbook import Logbook

H800 = Network(
    latency_s=0.0, bytes_per_s=200e9, flops_per_s=450e12, world=8, device="cuda", dtype="bfloat16", width=1152
)  # facts: NVLink each way, and what a block reaches
LONG = Thw(64, 32, 32)  # tokens of 64x512x512


@functools.cache
def cost(grid, *, name="stdit", text_tokens=120, **model):
    with torch.device("meta"):
        built = build_model(
            ModelConfig(name=name, **({"size": "XL"} | model)),
            ModelIo(in_channels=4, out_channels=8, text_width=4096, max_tokens=text_tokens),
        )
    return sample_cost(built, grid, text_tokens=text_tokens)


def choice(sp, *, network=H800, world=8, global_batch=8, name="stdit", accum=1, **model):
    return AutoChoice(
        sp=sp, world=world, global_batch=global_batch, accum=accum, recompute="none", element_bytes=2,
        cost=lambda grid: cost(grid, name=name, **model), networks=dict.fromkeys([1, 2, 4, 8], network),
    )  # fmt: skip


def workload(grid, **model):
    return Workload(grid=grid, batch=1, cost=cost(grid, **model), element_bytes=2)


# Forward as the facts have it, and backward: ring's gradients go around in float32, fastseq gathers x again.
@pytest.mark.parametrize(
    ("scheme", "forward_us", "backward_us"),
    [("dsp", 165, 165), ("ulysses", 330, 330), ("ring", 1321, 3 * 1321), ("fastseq", 743, 743 + 661)],
)
def test_a_layers_communication_is_the_facts(scheme, forward_us, backward_us):
    found = predict(workload(LONG), scheme, 8, H800, sp=SpConfig(degree=8, scheme=scheme))
    assert found.communication_s / 28 == pytest.approx((forward_us + backward_us) * 1e-6, rel=0.01)


def test_xl2_computes_970_microseconds_a_layer():
    one_way = predict(workload(LONG), "dsp", 8, H800, sp=SpConfig(degree=8)).compute_s / 3 / 28
    assert one_way == pytest.approx(970e-6, rel=0.02)


def test_dsp_is_picked_for_xl2_at_64x512x512():
    auto = choice(SpConfig(degree=8, scheme="auto"))
    assert auto(LONG) == ("dsp", 8)
    best = auto.predictions[LONG]
    assert best.step_s == best.compute_s + best.exposed_s
    assert best.exposed_s < best.communication_s
    assert auto.event(LONG) | {"predicted_ms": 0, "runner_up": ""} == {
        "bucket": "64x32x32", "scheme": "dsp", "degree": 8, "predicted_ms": 0, "runner_up": "",
    }  # fmt: skip


def test_a_scheme_without_a_rule_of_heads_is_picked_where_heads_dont_divide():
    auto = choice(SpConfig(degree=8, scheme="auto"), name="dit", heads=12)
    name, degree = auto(LONG)
    assert degree == 8
    assert SCHEMES[name](SpConfig(degree=8)).problems(LONG, size=8, heads=12, joint=True) == []


def test_small_samples_on_a_slow_network_stay_on_one_rank_where_that_is_allowed():
    slow = dataclasses.replace(H800, latency_s=1e-3, bytes_per_s=1e8)
    tiny = Thw(4, 8, 8)
    assert choice(SpConfig(degree=8, scheme="auto", min_degree=1), network=slow)(tiny) == ("local", 1)
    assert choice(SpConfig(degree=8, scheme="auto"), network=slow)(tiny)[1] == 8


def test_a_degree_whose_ranks_the_batch_cannot_be_dealt_to_is_not_picked():
    slow = dataclasses.replace(H800, latency_s=1e-3, bytes_per_s=1e8)
    auto = choice(SpConfig(degree=8, scheme="auto", min_degree=1), network=slow, global_batch=2)
    assert auto(Thw(4, 8, 8))[1] == 4  # two groups for two samples


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_more_bandwidth_is_never_slower_and_nothing_is_hidden_without_overlap(scheme):
    work = workload(LONG)
    sp = SpConfig(degree=4, scheme=scheme, ulysses=2 if scheme == "usp" else None)
    steps = [predict(work, scheme, 4, dataclasses.replace(H800, bytes_per_s=b), sp=sp) for b in (1e9, 1e10, 1e11, 1e12, 1e13)]
    assert [s.step_s for s in steps] == sorted((s.step_s for s in steps), reverse=True)
    assert all(0 <= s.exposed_s <= s.communication_s * (1 + 1e-12) for s in steps)
    blocking = predict(work, scheme, 4, H800, sp=sp.model_copy(update={"overlap": False}))
    assert blocking.exposed_s == pytest.approx(blocking.communication_s)


@pytest.mark.parametrize("name", ["stdit", "dit"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize(("ulysses", "element_bytes", "dw"), [(1, 2, "gather"), (2, 2, "keep"), (4, 4, "gather"), (2, 8, "keep")])
def test_the_trips_of_a_scheme_are_its_formula_in_both_directions(name, scheme, ulysses, element_bytes, dw):
    work = dataclasses.replace(workload(LONG, name=name), element_bytes=element_bytes)
    sp = SpConfig(degree=4, scheme=scheme, ulysses=ulysses if scheme == "usp" else None, fastseq_dw=dw)
    by_rows, sizes = cut(LONG, size=4)
    axis = Axis.JOINT if name == "dit" else Axis.TIME
    shards = _shards(work, scheme, by_rows=by_rows, sizes=sizes, sp=sp)
    trips = _TRIPS[scheme](_pieces(work, axis, shards[0], share=1 / 4, sp=sp))
    unit = LONG.volume // 4 * work.cost.width * element_bytes
    if scheme == "dsp" and name == "dit":
        return  # which it refuses
    assert [sum(t.units for t in direction) * unit for direction in trips] == pytest.approx(_bytes(work, axis, shards))


def test_a_pipeline_makes_no_more_pieces_than_there_are_things_to_part():
    def pieces(scheme, grid, axis, *, degree=4, chunks=64, name="stdit", overlap=True):
        work = workload(grid, name=name)
        sp = SpConfig(degree=degree, scheme=scheme, chunks=chunks, overlap=overlap)
        by_rows, sizes = cut(grid, size=degree)
        return _chunks(work, axis, _shards(work, scheme, by_rows=by_rows, sizes=sizes, sp=sp)[0], sp=sp)

    grid = Thw(10, 4, 5)
    assert pieces("dsp", grid, Axis.TIME) == (2, 5)  # 3, 3, 2, 2 frames; 5 places each
    assert pieces("dsp", grid, Axis.TIME, chunks=2) == (2, 2)
    assert pieces("dsp", grid, Axis.TIME, overlap=False) == (1, 1)
    assert pieces("dsp", Thw(2, 8, 3), Axis.SPACE) == (6, 1)  # by rows: some own no frame
    assert pieces("ulysses", grid, Axis.TIME) == pieces("fastseq", grid, Axis.TIME) == (20, 20)
    assert pieces("ulysses", grid, Axis.JOINT, name="dit") == (4, 4)  # 16 heads, 4 a rank
    assert pieces("fastseq", grid, Axis.JOINT, name="dit") == (1, 1)


def test_each_piece_of_a_pipeline_is_a_message():
    slow = dataclasses.replace(H800, latency_s=1e-3)
    took = [predict(workload(LONG), "dsp", 8, slow, sp=SpConfig(degree=8, chunks=chunks)).communication_s for chunks in (1, 2)]
    assert took[1] - took[0] == pytest.approx(28 * 4 * 1e-3)


def test_a_file_of_another_machine_does_not_stand_for_a_run():
    here = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "degree": 8}
    assert unfit(H800, **here) == []
    for change, word in (
        ({"device": torch.device("cpu")}, "device="),
        ({"dtype": torch.float32}, "dtype="),
        ({"degree": 16}, "world="),
    ):
        (said,) = unfit(H800, **(here | change))
        assert said.startswith(word) and "bench network" in said


def test_each_degree_is_predicted_with_what_was_measured_between_as_many_ranks():
    auto = choice(SpConfig(degree=8, scheme="auto", min_degree=2))
    slow = dataclasses.replace(H800, bytes_per_s=1e6)
    auto.networks = {2: slow, 4: H800, 8: slow}
    assert auto(LONG)[1] == 4


def test_an_image_whose_one_frame_dsp_would_leave_to_one_rank_goes_by_another_scheme():
    image = Thw(1, 32, 32)
    found = {p.scheme: p for p in choice(SpConfig(degree=8, scheme="auto")).candidates(image)}
    assert found["dsp"].compute_s > 2 * found["ulysses"].compute_s
    assert next(iter(found)) != "dsp"


def test_where_nothing_fits_every_broken_rule_is_told():
    with pytest.raises(ConfigError, match="fewer frames and fewer rows"):
        choice(SpConfig(degree=8, scheme="auto"))(Thw(2, 4, 4))


def test_the_tenth_step_of_a_bucket_is_told_beside_the_prediction():
    auto = choice(SpConfig(degree=8, scheme="auto"))
    auto(LONG)
    watch = StepWatch(auto.predictions)
    said = [watch.note(LONG, 0.1 * (i + 1)) for i in range(12)]
    assert [i for i, fields in enumerate(said) if fields] == [9]
    assert said[9]["measured_ms"] == pytest.approx(650)  # the first two warm up
    assert said[9]["predicted_ms"] == pytest.approx(1e3 * auto.predictions[LONG].step_s)
    assert watch.note(Thw(1, 1, 1), 1.0) is None


def test_a_network_survives_its_file_and_a_wrong_one_is_refused(tmp_path):
    path = tmp_path / "network.json"
    write_network(path, H800, details={"all_to_all": []})
    assert read_network(path) == H800
    path.write_text(path.read_text().replace("200000000000.0", "-1").replace('"cuda"', "7"))
    with pytest.raises(ConfigError) as caught:
        read_network(path)
    assert [("bytes_per_s=-1" in p, "device=7" in p) for p in caught.value.problems] == [(True, False), (False, True)]
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="bench network"):
            read_network(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_network(tmp_path / "absent.json")


def test_a_line_is_fitted_through_transfers():
    latency, bandwidth = fit_line([10**5, 10**6, 10**7], [1e-3 + s / 1e9 for s in (10**5, 10**6, 10**7)])
    assert (latency, bandwidth) == (pytest.approx(1e-3), pytest.approx(1e9))
    assert fit_line([10, 20], [2.0, 1.0]) == (0.0, 20.0)


def test_on_a_gpu_only_windows_of_one_shape_after_its_first_say_what_its_steps_take():
    long, image = SimpleNamespace(shapes=(LONG,)), SimpleNamespace(shapes=(Thw(1, 32, 32),))
    windows = [[long, long], [long, image], [image, image], [long, long], [image]]

    def watched(device):
        book = Logbook(
            mesh=SimpleNamespace(device=torch.device(device)), metrics=None, events=None, progress=None, trackers=None,
            peak_flops=None, watch=None,
        )  # fmt: skip
        return [len(book._timed(window)) for window in windows]

    assert watched("cuda") == [0, 0, 2, 2, 1]
    assert watched("cpu") == [2, 2, 2, 2, 1]


def test_units_with_a_budget_of_tokens_are_predicted_with_as_many_samples_as_fill_them():
    one, eight = (choice(SpConfig(degree=8, scheme="auto"), global_batch=n) for n in (1, 8))
    filled = choice(SpConfig(degree=8, scheme="auto"), global_batch=1)
    filled.unit_tokens = 8 * LONG.volume + 7
    for auto in (one, eight, filled):
        auto(LONG)
    assert filled.predictions[LONG] == eight.predictions[LONG] != one.predictions[LONG]
