"""A rank that dies, stalls or does something else than the others ends the run: all say what happened, and nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cli_process import running
from dataset_factory import write_dataset
from forked_ranks import Fault, run
from training import SAMPLES, metrics, overrides, refused

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import CommunicationError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.mesh import build_mesh, process_group
from opensora_dist.parallel.places import AxisName
from opensora_dist.parallel.sequence.agree import Agreement, Intent
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.resilience.endings import Ending

SP2 = ["parallel.sp.degree=2", "run.steps=50", "run.log_every=1"]
WITHIN_S = 20.0
"""After a death: sockets close at once; the rest is a process that ends on a busy machine."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("lost") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _say_what_happened(ended, fault, *, within_s):
    others = {rank: e for rank, e in ended.items() if rank != fault.rank}
    assert {e.code for e in others.values()} == {1}, {rank: e.said for rank, e in others.items()}
    for rank, e in others.items():
        assert f"error: rank {rank} lost contact" in e.said, e.said
        assert "Traceback" not in e.said, e.said
        assert "parallel.timeout_s" in e.said, e.said
        assert e.after_s < within_s
        assert e.noted is Ending.LOST, "the scheduler starts the run again"
    assert ended[fault.rank].noted is Ending.KILLED


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("place, stage", [("forward", 0), ("save", 3), ("clip", 3), _slow("backward", 2), _slow("clip", 0)])
def test_a_rank_killed_in_a_step_ends_the_one_that_shares_its_samples(data, tmp_path, place, stage):
    fault = Fault(place, signal.SIGKILL)
    args = overrides(data, tmp_path / "run", *SP2, f"parallel.zero.stage={stage}", "parallel.timeout_s=60")
    args.append("checkpoint.every_steps=3")
    ended = run(args, fault, world=2, logs=tmp_path / "logs", limit_s=WITHIN_S)
    assert ended[1].code == -signal.SIGKILL
    _say_what_happened(ended, fault, within_s=WITHIN_S)


@pytest.mark.parametrize("rank", [3, _slow(0)])
def test_a_rank_killed_in_a_step_ends_the_ranks_with_other_samples_too(data, tmp_path, rank):
    fault = Fault("backward", signal.SIGKILL, rank=rank)
    args = overrides(data, tmp_path / "run", *SP2, "parallel.zero.stage=3", "parallel.timeout_s=60")
    ended = run(args, fault, world=4, logs=tmp_path / "logs", limit_s=WITHIN_S)
    _say_what_happened(ended, fault, within_s=WITHIN_S)


@pytest.mark.parametrize("place, stage", [("clip", 3), _slow("forward", 0)])
def test_a_rank_that_stalls_ends_the_run_after_the_timeout(data, tmp_path, place, stage):
    fault = Fault(place, signal.SIGSTOP)
    args = overrides(data, tmp_path / "run", *SP2, f"parallel.zero.stage={stage}", "parallel.timeout_s=5")
    ended = run(args, fault, world=2, logs=tmp_path / "logs", limit_s=5 + WITHIN_S)
    _say_what_happened(ended, fault, within_s=5 + WITHIN_S)
    assert ended[0].after_s > 3


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_the_command_with_code_1_and_leaves_no_process(data, tmp_path):
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    )
    args = overrides(data, tmp_path / "run", "run.steps=4000", *SP2[:1], "run.log_every=1", "parallel.timeout_s=30")
    with running("train", *args, launcher=launcher) as command:
        command.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) >= 3)
        pids = command.ranks()
        assert sorted(pids) == [0, 1]
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        ended = command.end(limit_s=60)
        assert time.monotonic() - began < 60
    assert ended.code == 1, ended.err
    assert "error: rank 0 lost contact" in ended.err, ended.err
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]


# --- ranks that would do different things


def _other_latents(rank, at_step):
    """Rank ``rank`` reads latents of two columns fewer, from a step on, as from another data set."""
    return _loading(
        rank, at_step, lambda m: replace(m, latents_BCthw=m.latents_BCthw[..., 2:], latent=m.latent._replace(w=m.latent.w - 2))
    )


def _part_missing(rank, at_step):
    """Rank ``rank`` has fewer columns of latents at hand than its part."""
    return _loading(rank, at_step, lambda m: replace(m, latents_BCthw=m.latents_BCthw[..., 2:]))


def _other_samples(rank, at_step):
    """Rank ``rank`` has the samples in another order."""
    return _loading(rank, at_step, lambda m: replace(m, samples=m.samples[::-1]))


def _longer_text(rank, at_step):
    """Rank ``rank`` pads captions to another length, and its data are of another type."""
    return _loading(
        rank, at_step, lambda m: replace(m, text_BYE=m.text_BYE.repeat(1, 2, 1), latents_BCthw=m.latents_BCthw.double())
    )


def _loading(rank, at_step, change):
    real = Loader.__iter__

    def steps(self):
        for data in real(self):
            if dist.get_rank() == rank and data.step == at_step:
                data.micros[:] = [change(micro) for micro in data.micros]
            yield data

    return mock.patch.object(Loader, "__iter__", steps)


@pytest.mark.parametrize("world", [2, 4])
def test_another_shape_on_one_rank_is_named_with_every_ranks_value_by_all_that_share_the_sample(ranks, data, tmp_path, world):
    args = overrides(data, tmp_path, *SP2)
    said = ranks.run(refused, args, _other_latents, world - 1, 3, world=world)
    width = {0: 6, 1: 4}
    for rank in (world - 2, world - 1):
        assert f"ranks {[world - 2, world - 1]} share samples" in said[rank]
        match = re.search(rf"latent columns: rank {world - 2} -> (\d), rank {world - 1} -> (\d)", said[rank])
        assert match and int(match[1]) == int(match[2]) + 2, said[rank]
        assert int(match[1]) in width.values()
    for rank in range(world - 2):  # other samples: these only see the others go
        assert "lost contact" in said[rank]
    assert len(metrics(tmp_path)) <= 3


@pytest.mark.parametrize(
    "fault, names",
    [
        (_part_missing, ["latents at hand: rank 0 -> ", "where 1x"]),
        (_other_samples, ["samples: rank 0 -> "]),
        (_longer_text, ["text tokens: rank 0 -> ", "dtype: rank 0 -> float32, rank 1 -> float64"]),
    ],
)
def test_what_differs_is_named_by_every_rank(ranks, data, tmp_path, fault, names):
    for said in ranks.run(refused, overrides(data, tmp_path, *SP2), fault, 1, 1, world=2):
        assert all(name in said for name in names), said
        assert "step" not in said.split(":")[1], "what is alike is not listed"


def test_ranks_at_different_steps_don_t_mistake_one_for_the_other(ranks):
    for said in ranks.run(_ahead, world=3):
        assert "step: rank 0 -> 7, rank 1 -> 8, rank 2 -> 7" in said
        assert "degree" not in said


def _ahead():
    sp = SpConfig(degree=3)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20)
    try:
        Agreement(mesh).check([_intent(mesh, sp, step=8 if mesh.rank == 1 else 7)])
    except CommunicationError as error:
        return str(error)
    raise AssertionError("nothing was said")


def _intent(mesh, sp, *, step, degree=None):
    grid, patch = Thw(4, 2, 2), Thw(1, 2, 2)
    shard = SequenceParallel(mesh, sp, choose=lambda grid: ("dsp", degree or sp.degree)).shard(grid)
    latent = Thw(4, 4, 4)
    return Intent(
        step=step,
        digest="0123",
        samples=(5, mesh.rank // (degree or sp.degree)),
        latent=latent,
        part=shard.region.times(patch).shape(latent),
        text_tokens=4,
        dtype=torch.float32,
        shard=shard,
        patch=patch,
    )


def test_ranks_that_agree_go_on_whatever_their_parts_and_a_single_rank_asks_nobody(ranks):
    assert ranks.run(_agree, 3, world=3) == [True] * 3
    assert ranks.run(_agree, 1, world=2) == [True] * 2
    assert ranks.run(_agree, 2, world=4) == [True] * 4


def test_where_fewer_ranks_share_a_shape_only_these_need_the_same_samples(ranks):
    assert ranks.run(_agree_in_pairs, world=4) == [True] * 4


def _agree_in_pairs():
    sp = SpConfig(degree=4, scheme="auto", min_degree=2)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20)
    assert set(mesh.links) == {2, 4}
    intent = _intent(mesh, sp, step=1, degree=2)
    Agreement(mesh).check([intent])
    with pytest.raises(CommunicationError, match="samples: rank 0 -> ") as caught:
        Agreement(mesh).check([replace(intent, samples=(mesh.rank,))])
    assert "latents at hand" not in str(caught.value)
    return True


def _agree(degree):
    sp = SpConfig(degree=degree)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20)
    agreement = Agreement(mesh)
    if degree == 1:
        with mock.patch.object(dist, "all_gather", side_effect=AssertionError("no rank to ask")):
            agreement.check([_intent(mesh, sp, step=1)] * 3)
    else:
        agreement.check([_intent(mesh, sp, step=1)])
    return True


def test_the_parts_of_a_pack_are_compared_in_two_messages_however_many_there_are(ranks):
    for gathers, bad in ranks.run(_many_parts, world=2):
        assert gathers == 2
        assert bad == [number == 13 for number in range(20)]


def _many_parts():
    sp = SpConfig(degree=2)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20)
    parts = [replace(_intent(mesh, sp, step=1), samples=(number,)) for number in range(20)]
    if mesh.rank == 1:
        parts[13] = replace(parts[13], num_bad=1)
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
        bad = Agreement(mesh).check(parts)
    return gather.call_count, bad


def test_packs_of_another_number_of_parts_or_with_another_part_are_named_by_every_rank(ranks):
    for fewer, other in ranks.run(_other_packs, world=3):
        assert "shapes run at once: rank 0 -> 3, rank 1 -> 1, rank 2 -> 3" in fewer and "samples: " not in fewer
        assert "part 2 of a pack, text tokens: rank 0 -> 4, rank 1 -> 9, rank 2 -> 4" in other and "part 1" not in other


def _other_packs():
    """Rank 1 has fewer parts than the others; then another caption in one of as many."""
    sp = SpConfig(degree=3)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20)
    part = replace(_intent(mesh, sp, step=1), samples=(5,))
    other = replace(part, text_tokens=9 if mesh.rank == 1 else 4)
    said = []
    for parts in ([part] * (1 if mesh.rank == 1 else 3), [part, part, other]):
        with pytest.raises(CommunicationError) as caught:
            Agreement(mesh).check(parts)
        said.append(str(caught.value))
    return tuple(said)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """As many samples of the same shapes, of other content."""
    path = tmp_path_factory.mktemp("other") / "data"
    write_dataset(path, samples=SAMPLES, seed=1)
    return path


@pytest.mark.parametrize("world, shared", [(2, []), (4, ["parallel.sp.degree=2"])], ids=["dp2", "dp2sp2"])
def test_ranks_whose_copies_of_the_data_differ_are_refused_at_the_start_by_name(ranks, data, other_data, tmp_path, world, shared):
    hashes = [Index.open(path).dataset_hash for path in (data, other_data)]
    assert len(set(hashes)) == 2
    alike, other = list(range(world // 2)), list(range(world // 2, world))
    for said in ranks.run(_refused_with_own_copy, str(data), str(other_data), str(tmp_path), shared, world=world):
        assert f"data set: ranks {alike} -> {hashes[0]}, ranks {other} -> {hashes[1]}" in said
        assert "first batch: " in said and "run.seed" not in said
        assert "copy the folder again" in said
    assert not (tmp_path / "metrics.jsonl").exists()


def _refused_with_own_copy(data, other_data, run_dir, shared):
    mine = data if dist.get_rank() < dist.get_world_size() // 2 else other_data
    return refused(overrides(Path(mine), Path(run_dir), "run.steps=3", *shared))


def test_ranks_that_would_take_the_same_data_in_another_order_are_refused_at_the_start(ranks, data, tmp_path):
    for said in ranks.run(_refused_with_own_seed, str(data), str(tmp_path), world=2):
        assert "run.seed: ranks [0] -> 1, ranks [1] -> 2" in said and "first batch: " in said
        assert "data set: " not in said


def _refused_with_own_seed(data, run_dir):
    return refused(overrides(Path(data), Path(run_dir), "run.steps=3", f"run.seed={1 + dist.get_rank()}"))


# --- groups


def test_a_collective_that_one_rank_never_joins_fails_after_the_runs_timeout_in_every_group(ranks):
    waited = ranks.run(_lonely_collectives, world=4)[0]
    assert {"dp_shard", "dp_replicate", "ulysses", "ring", "tp", "fsdp", "copy", "sp", "control", "sp_control"} <= set(waited)
    ranks.close()  # what the other ranks never answered is still in flight in these
    assert all(TIMEOUT_S / 2 < seconds < TIMEOUT_S + 10 for seconds in waited.values()), waited


def test_groups_are_made_for_the_degrees_that_can_occur_alone(ranks):
    assert ranks.run(_degrees, SpConfig(degree=4), world=4) == [{4}] * 4
    assert ranks.run(_degrees, SpConfig(degree=4, scheme="auto"), world=4) == [{4}] * 4
    assert ranks.run(_degrees, SpConfig(degree=4, scheme="auto", min_degree=1), world=4) == [{2, 4}] * 4


def _degrees(sp):
    return set(build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20).links)


TIMEOUT_S = 3.0


def _lonely_collectives():
    """Seconds until rank 0 was told, by group; it posts one collective to each group of a mesh at once, and the others none."""
    waited = {}
    usp = SpConfig(degree=4, scheme="usp", ulysses=2)
    for dp_replicate, sp, tp in ((1, SpConfig(degree=2), 1), (2, SpConfig(degree=2), 1), (1, usp, 1), (1, SpConfig(degree=2), 2)):
        mesh = build_mesh(torch.device("cpu"), dp_replicate=dp_replicate, sp=sp, tp=tp, timeout_s=TIMEOUT_S)
        links, groups = mesh.links[sp.degree], {name: mesh.device_mesh.get_group(name) for name in map(str, AxisName)}
        assert links.ring.group is groups["ring"] and links.ulysses.group is groups["ulysses"]
        groups |= {"fsdp": mesh.fsdp.get_group(), "copy": mesh.copy.get_group(), "sp": links.sp.group}
        groups |= {"control": mesh.control, "sp_control": mesh.sp_control}
        if mesh.rank == 0:
            began = time.monotonic()
            works = {
                name: dist.all_reduce(torch.ones(1), group=group, async_op=True)
                for name, group in groups.items()
                if dist.get_world_size(group) > 1
            }
            for name, work in works.items():
                with pytest.raises(CommunicationError, match="lost contact"), lost_contact_said(timeout_s=TIMEOUT_S):
                    work.wait()
                waited[name] = time.monotonic() - began
        dist.barrier()  # of the pool's own group, whose timeout is longer: rank 0 is waited for here
    return waited


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("connection closed by peer"), KeyError("timed out")])
def test_errors_that_are_not_of_a_lost_rank_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, lost_contact_said(timeout_s=1):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), RuntimeError("connection reset by peer")], ids=str)
def test_only_what_says_so_is_a_lost_rank_in_an_exchange(ranks, error):
    (caught,) = ranks.run(_in_exchange, error, world=1)
    assert caught == ("CommunicationError" if "connection" in str(error) else "RuntimeError")


def _in_exchange(error):
    def fail():
        raise error

    with pytest.raises((RuntimeError, CommunicationError)) as caught:
        Exchange(dist.group.WORLD).guarded(fail, what="ring shift")
    return type(caught.value).__name__


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("error", [ValueError("a mistake"), CommunicationError("lost contact")], ids=str)
def test_an_error_is_said_before_anything_is_waited_for(monkeypatch, world, error):
    """Closing communicators waits for transfers in flight, which the other ranks may never answer."""
    closed = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_args, **_more: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: closed.append(True))
    with pytest.raises(type(error)) as caught, process_group(torch.device("cpu"), timeout_s=1):
        raise error
    assert caught.value is error and closed == [True] * (world == 1)
