"""What watches over a run, piece by piece: clocks, verdicts, counters, hashes, faults by name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from opensora_dist.config.faults import AtStep, InSave, Slower, parse_fault
from opensora_dist.config.load import load_config
from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import FaultConfig, TrainConfig
from opensora_dist.core.errors import TrainingError
from opensora_dist.core.types import Thw
from opensora_dist.observe.events import EventLog, append_event
from opensora_dist.parallel.mesh import name_of_start
from opensora_dist.recipes.checks import training_problems
from opensora_dist.resilience import restarts
from opensora_dist.resilience.faults import Faults
from opensora_dist.resilience.nonfinite import NonFiniteGuard
from opensora_dist.resilience.position import Position, Waits, judge, place_of
from opensora_dist.resilience.replicas import tensor_hash
from opensora_dist.resilience.startup import StopWhileStarting
from opensora_dist.resilience.straggler import stragglers
from opensora_dist.resilience.watchdog import Clock
from opensora_dist.train.logbook import Logbook, StepNote

# --- the clock


class _Time:
    now = 100.0

    def __call__(self):
        return self.now


def _clock(watchdog_s=10.0):
    time = _Time()
    return Clock(watchdog_s=watchdog_s, now=time), time


def _turns(clock, time, *turns):
    for phase, seconds in turns:
        clock.turn(phase)
        time.now += seconds


def test_a_phase_may_last_three_times_the_slow_steps_or_the_configs_seconds_whichever_is_more():
    clock, time = _clock()
    _turns(clock, time, *[("step", 1.0), ("data", 0.1)] * 5)
    assert clock.limit_s == 10
    _turns(clock, time, ("step", 20.0), ("data", 0.1))
    assert clock.limit_s == pytest.approx(60), "one slow step in few is the 99th percentile"
    _turns(clock, time, *[("step", 1.0), ("data", 0.1)] * 128)
    assert clock.limit_s == 10, "it has left the window"


def test_what_is_done_for_the_first_time_and_saves_and_validation_may_last_ten_times_as_long():
    clock, time = _clock()
    assert clock.phase == "data" and clock.limit_s == 100
    _turns(clock, time, ("step", 30.0))
    assert clock.limit_s == 100, "the first step compiles"
    _turns(clock, time, ("data", 1), ("step", 1), ("save", 1))
    assert clock.limit_s == 100
    _turns(clock, time, ("save", 50), ("data", 1))
    assert clock.limit_s == pytest.approx(90), "30 s were a step once"
    clock.turn("save")
    assert clock.limit_s == pytest.approx(150)


def test_the_age_is_that_of_the_phase_and_time_while_stopped_is_none():
    clock, time = _clock()
    _turns(clock, time, ("step", 7.0))
    assert clock.age_s == 7
    clock.restart()
    assert clock.age_s == 0 and clock.phase == "step"


# --- who holds up whom


def _at(rank, waits, *, what="all_reduce", step=5, phase="step", seconds=90.0):
    return Position(rank=rank, step=step, phase=phase, what=what, waits=waits, seconds=seconds)


def _judged(*positions, world):
    return judge({p.rank: p for p in positions}, world=world)


def test_the_rank_that_waits_for_nobody_holds_up_the_others_and_their_collective_is_named():
    held = _at(1, Waits.NO, what="_load (data/loader.py:7)")
    verdict = _judged(_at(0, Waits.YES), held, _at(2, Waits.YES, what="all_to_all of (4, 8) float32"), world=3)
    assert verdict.ranks == (1,)
    assert verdict.text == (
        "rank 1 is held up in _load (data/loader.py:7) (step 5, phase step) for 90 s, while rank 0 waits in all_reduce for 90 s "
        "and rank 2 waits in all_to_all of (4, 8) float32 for 90 s"
    )


def test_a_rank_that_does_not_answer_comes_first_then_one_behind_then_one_that_may_compute():
    silent = _judged(_at(0, Waits.YES), _at(2, Waits.NO), world=3)
    assert silent.ranks == (1,) and "rank 1 does not answer" in silent.text and "rank 0 waits in all_reduce" in silent.text
    assert _judged(_at(0, Waits.YES), _at(1, Waits.YES, step=4), world=2).ranks == (1,)
    assert _judged(_at(0, Waits.PERHAPS, what="backward"), _at(1, Waits.YES), world=2).ranks == (0,)


def test_where_all_wait_alike_nobody_is_blamed():
    verdict = _judged(_at(0, Waits.YES), _at(1, Waits.YES), world=2)
    assert verdict.ranks == () and "none more than the others" in verdict.text


def test_a_single_process_that_hangs_is_named():
    assert _judged(_at(0, Waits.NO, what="read (data/reader.py:3)"), world=1).ranks == (0,)


def _in_file(path, function):
    """A function that seems to be in another file, which says that it is entered and waits."""
    space = {}
    exec(
        compile(
            f"def {function}(entered, leave, what='all_to_all of (2,) float32'):\n    entered.set(); leave.wait()", path, "exec"
        ),
        space,
    )
    return space[function]


@pytest.mark.parametrize(
    "path, function, what, waits",
    [
        ("/x/torch/distributed/distributed_c10d.py", "all_gather", "all_gather", Waits.YES),
        ("/x/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", "foreach_reduce", "foreach_reduce", Waits.YES),
        ("/x/opensora_dist/parallel/sequence/exchange.py", "guarded", "all_to_all of (2,) float32", Waits.YES),
        ("/x/opensora_dist/resilience/signals.py", "_read", "the vote on stopping", Waits.YES),
        ("/x/torch/autograd/graph.py", "_engine_run_backward", "backward", Waits.PERHAPS),
        ("/x/opensora_dist/data/loader.py", "_read_shard", "_read_shard (data/loader.py:2)", Waits.NO),
        ("/x/torch/distributed/checkpoint/filesystem.py", "write_data", "write_data (checkpoint/filesystem.py:2)", Waits.NO),
    ],
)
def test_a_stack_says_which_collective_a_rank_waits_in(path, function, what, waits):
    place = _place_inside(_in_file(path, function))
    assert (place.what, place.waits) == (what, waits)


def _place_inside(function):
    """Of a thread that waits in ``function``, as if it did in C code, which has no frames."""
    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=function, args=(entered, leave))
    thread.start()
    entered.wait()
    try:
        frame = sys._current_frames()[thread.ident]
        while frame.f_code.co_filename == threading.__file__:
            frame = frame.f_back
        return place_of(frame)
    finally:
        leave.set()
        thread.join()


# --- steps that are not finite


def _step(step, *, skipped, ranks=()):
    return SimpleNamespace(step=step, skipped=skipped, digest=f"d{step}", bad_ranks=ranks)


def test_skipped_steps_end_the_run_only_in_a_row_and_across_flushes():
    guard = NonFiniteGuard(max_skipped=3)
    guard.check([_step(1, skipped=True), _step(2, skipped=True), _step(3, skipped=False)])
    guard.check([_step(4, skipped=True)])
    guard.check([_step(5, skipped=True, ranks=(1,))])
    with pytest.raises(TrainingError) as caught:
        guard.check([_step(6, skipped=True, ranks=(0, 2))])
    for said in (
        "3 steps in a row",
        "step 4, batch d4: finite loss on every rank",
        "step 6, batch d6: loss not finite on rank 0, 2",
    ):
        assert said in str(caught.value)


# --- hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bit_of_every_element_changes_the_hash(dtype):
    tensor = torch.empty(7, dtype=dtype).normal_(generator=torch.Generator().manual_seed(0))
    bits = 8 * tensor.element_size()
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    whole = int(tensor_hash(tensor))
    for i in range(7):
        for bit in range(bits):
            other = tensor.clone()
            other.view(integers)[i] ^= 1 << bit if bit < bits - 1 else -(1 << bit)
            assert int(tensor_hash(other)) != whole, (i, bit)


def test_the_hash_sees_order_and_takes_empty_scalar_strided_and_not_a_number(monkeypatch):
    a = torch.arange(12.0)
    assert int(tensor_hash(a)) != int(tensor_hash(a.flip(0)))
    assert int(tensor_hash(a.view(3, 4).t())) == int(tensor_hash(a.view(3, 4).t().contiguous()))
    assert int(tensor_hash(torch.empty(0))) == 0
    assert int(tensor_hash(torch.tensor(float("nan")))) == int(tensor_hash(torch.tensor(float("nan"))))
    whole = int(tensor_hash(a))
    monkeypatch.setattr("opensora_dist.resilience.replicas._CHUNK", 5)
    assert int(tensor_hash(a)) == whole, "pieces are an affair of memory alone"


# --- stragglers


def test_a_rank_is_named_from_the_ratio_on_and_for_what_it_is_slow_in():
    usual = [1e-3, 1e-6, 0.0, 0.1]
    for slower, named in ((1.19, []), (1.21, [(3, "compute", 1.21)])):
        table = torch.tensor([usual, usual, usual, [usual[0] * slower, usual[1] * slower, 0.0, 0.1]], dtype=torch.float64)
        assert [(s.rank, s.what, s.ratio) for s in stragglers(table, ratio=1.2)] == named
    late = torch.tensor([usual, [1e-3, 1e-6, 0.02, 0.1]], dtype=torch.float64)
    assert [(s.rank, s.what, s.ratio) for s in stragglers(late, ratio=1.2)] == [(1, "data", 1.25)]


def test_a_rank_with_more_tokens_is_no_straggler_and_one_rank_never_is():
    assert not stragglers(torch.tensor([[1e-3, 1e-6, 0, 0.1], [2e-3, 1e-6, 0, 0.1]], dtype=torch.float64), ratio=1.2)
    assert not stragglers(torch.tensor([[1e-3, 1e-6, 0, 0.1], [1e-3, 2e-6, 0, 0.1]], dtype=torch.float64), ratio=1.2)
    assert not stragglers(torch.tensor([[1e-3, 1e-6, 9, 0.1]], dtype=torch.float64), ratio=1.2)


# --- faults


@pytest.mark.parametrize(
    "name, text, fault",
    [
        ("kill_rank", "1@step20", AtStep(rank=1, step=20)),
        ("slow_rank", "0@x1.5", Slower(rank=0, factor=1.5)),
        ("kill_in_save", "2@write", InSave(rank=2, phase="write")),
        ("kill_rank", "1@step0", None),
        ("kill_rank", "1@20", None),
        ("kill_rank", "one@step2", None),
        ("slow_rank", "0@x1", None),
        ("slow_rank", "0@step2", None),
        ("bad_sample", "", None),
    ],
)
def test_a_fault_is_a_rank_and_a_step_a_factor_or_a_phase(name, text, fault):
    assert parse_fault(name, text) == fault


def test_faults_that_mean_nothing_are_listed_together_with_what_would_do():
    given = ["fault.kill_rank=x", "fault.slow_rank=1@2", "fault.nan_loss=7@step3", "fault.kill_in_save=0@lunch"]
    config = load_config(TrainConfig, None, overrides=given)
    said = "\n".join(p.message for p in train_problems(config, world=2))
    assert "fault.kill_rank='x' must be RANK@stepN, as 1@step20" in said
    assert "fault.slow_rank='1@2' must be RANK@xF" in said
    assert "fault.nan_loss='7@step3' names rank 7, but there are 2; use a rank from 0 to 1" in said
    said = "\n".join(p.message for p in training_problems(config))
    assert "fault.kill_in_save='0@lunch' names no phase of a save; use one of copy," in said


def test_a_fault_happens_once_in_a_run_directory_on_its_rank_and_leaves_its_mark_first(tmp_path):
    config = FaultConfig(bad_sample="1@step3", flip_bit="1@step2")
    assert not any(Faults(config, run_dir=tmp_path, rank=0).bad_sample(step) for step in range(5))
    for happens in (True, False):
        faults = Faults(config, run_dir=tmp_path, rank=1)
        assert [faults.bad_sample(step) for step in range(4)] == [False, False, happens, False]
        weights = {"empty": torch.empty(0), "w": torch.ones(2, 3)}
        faults.disarm(weights, step=2)
        assert int((weights["w"] != 1).sum()) == happens
    assert json.loads((tmp_path / "faults" / "bad_sample-rank-1.json").read_text())["asked"] == "1@step3"


def test_nothing_of_a_fault_is_in_a_step_in_which_none_is_due(tmp_path):
    model = nn.Linear(2, 2)
    faults = Faults(FaultConfig(nan_loss="0@step2"), run_dir=tmp_path, rank=0)
    finite = []
    for step in (1, 2, 3):
        faults.arm(model, step=step)
        assert bool(model._forward_hooks) == (step == 2)
        finite.append(bool(torch.isfinite(model(torch.ones(1, 2))).all()))
        faults.disarm({}, step=step)
    assert finite == [True, False, True] and not model._forward_hooks


# --- restarts


def test_two_failed_starts_from_the_same_step_are_no_progress_and_one_is_none_yet(tmp_path):
    saved = [0]
    progress = restarts.Progress(tmp_path, saved_step=lambda: saved[-1])
    restarts.note_start(tmp_path, step=0)
    assert progress.stuck() is None
    restarts.note_start(tmp_path, step=0)
    saved.append(10)
    assert progress.stuck() is None, "it saved a later step before it failed"
    restarts.note_start(tmp_path, step=10)
    assert progress.stuck() is None, "it went on from a later step"
    restarts.note_start(tmp_path, step=10)
    assert "after going on from step 10" in progress.stuck()


def test_two_failures_before_training_began_are_no_progress_whatever_an_earlier_launch_noted(tmp_path):
    restarts.note_start(tmp_path, step=30)
    progress = restarts.Progress(tmp_path, saved_step=lambda: 30)
    assert progress.stuck() is None
    assert "before training began" in progress.stuck()


def _start(monkeypatch, folder, *, restart, step, saved=0):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    restarts.refuse_without_progress(folder, saved_step=lambda: saved)
    restarts.note_start(folder, step=step)


def test_under_torchrun_a_third_start_from_the_same_step_is_refused_and_its_agent_asked_to_end(monkeypatch, tmp_path):
    killed, previous = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for launch in range(2):
        _start(monkeypatch, tmp_path, restart=0, step=0)
        _start(monkeypatch, tmp_path, restart=1, step=0)
        if launch == 0:
            with pytest.raises(TrainingError, match="two starts in a row failed after going on from step 0"):
                _start(monkeypatch, tmp_path, restart=2, step=0)
            assert killed == [(os.getppid(), signal.SIGTERM)]
            signal.signal(signal.SIGTERM, previous)
    killed.clear()
    monkeypatch.setattr(restarts, "_ASKING_S", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TrainingError):
        _start(monkeypatch, tmp_path, restart=2, step=0)
    assert not killed, "the first rank of a machine asks"


def test_under_torchrun_a_start_after_progress_is_not_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for restart, (step, saved) in enumerate([(0, 0), (5, 5), (5, 5), (10, 10), (15, 15)]):
        _start(monkeypatch, tmp_path, restart=restart, step=step, saved=saved)


def test_over_several_machines_whose_agents_count_apart_no_start_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    for restart in range(4):
        _start(monkeypatch, tmp_path, restart=restart, step=0)


def test_a_note_that_a_kill_cut_off_costs_only_itself(tmp_path):
    (tmp_path / restarts.RESTARTS_NAME).write_text('{"restart": 0, "step": 3}\n{"restart": 1, "st')
    restarts.note_start(tmp_path, step=4)
    assert [json.loads(line)["step"] for line in (tmp_path / restarts.RESTARTS_NAME).read_text().splitlines()] == [3, 4]


def test_the_store_of_a_single_process_can_be_asked_from_a_thread_of_its_own():
    """What the watchdog leans on, for a process that no launcher started."""
    store = dist.PrefixStore("watchdog", dist.HashStore().clone())
    store.set("hang", "0")
    assert store.check(["hang"]) and not store.check(["other"])


_HANGS = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from opensora_dist.resilience import watchdog
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
watchdog._POLL_S, watchdog._LAST_S = 0.05, 0.5
def event(kind, record):
    raise KeyError("what nobody thought of")
dog = watchdog.Watchdog(watchdog_s=0.01, run_dir=Path(sys.argv[1]), rank=0, world=1, event=event)
dog.start()
time.sleep(50)
"""


def test_a_run_that_hangs_is_ended_whatever_happens_to_who_ends_it(tmp_path):
    """A run directory that can't be written, as one on a disk that went read-only; and what ends the watchdog's own thread."""
    (tmp_path / "logs").write_text("no folder")
    runs = [
        subprocess.Popen([sys.executable, "-c", _HANGS, folder], stderr=subprocess.PIPE, text=True)
        for folder in (tmp_path, tmp_path / "run")
    ]
    said = [run.communicate(timeout=40)[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    assert "stacks are in stderr, since" in said[0] and "step 0, phase data" in said[0] and "most recent call first" in said[0]
    assert "what nobody thought of" in said[1]


# --- the name of a start


def _meet(store, *, world, gone=()):
    """Each rank's name of a start, None where it waited in vain."""
    names = dict.fromkeys(range(world))

    def rank(number):
        with contextlib.suppress(dist.DistStoreError):
            names[number] = name_of_start(store.clone(), rank=number, world=world, timeout=timedelta(seconds=1 if gone else 30))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world) if number not in gone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [names[number] for number in range(world)]


def test_ranks_of_a_start_share_a_name_that_no_start_before_had_however_that_one_ended():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = _meet(store, world=3)
    assert len(set(first)) == 1 and None not in first
    assert _meet(store, world=3, gone=[2])[0] is None, "rank 0 waits for all"
    assert _meet(store, world=3, gone=[0]) == [None] * 3, "no start before it answers"
    last = _meet(store, world=3)
    assert len(set(last)) == 1 and None not in last and last != first


# --- signals after the loop, events beside the main rank's, times of a step


def test_after_the_start_a_signal_does_what_it_did_before(tmp_path):
    caught = []
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: caught.append(number))
    try:
        with StopWhileStarting(tmp_path, saved_step=lambda: 0, launched=True) as starting:
            starting.over()
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_an_event_of_another_process_leaves_a_line_that_is_being_written_alone(tmp_path):
    log = EventLog(tmp_path)
    log.log("start")
    path = tmp_path / "events.jsonl"
    with open(path, "a") as writer:
        writer.write('{"event": "sa')
        writer.flush()
        before = path.read_text()
        append_event(tmp_path, "hang", {"ranks": [1]})
    assert path.read_text().startswith(before)
    log.close()


def test_on_a_gpu_a_logged_step_has_its_part_of_the_time_that_the_device_took(monkeypatch):
    mesh = SimpleNamespace(device=torch.device("cuda"), world=1, tp_size=1, control=None)
    book = Logbook(mesh=mesh, metrics=None, events=None, progress=None, trackers=None, peak_flops=None, watch=None)
    result = SimpleNamespace(loss=torch.ones(()), grad_norm=torch.ones(()), skipped=torch.zeros(()))
    for step, wait_s in ((1, 0.01), (2, 0.02)):
        note = {
            "step": step,
            "lr": 0.1,
            "shapes": (Thw(1, 1, 1),),
            "samples": 1,
            "tokens": 1,
            "budget_tokens": None,
            "flops": 1,
            "epoch": 0,
            "digest": "",
        }
        book.add(StepNote(**note, step_s=0.1, data_wait_s=wait_s, bad_samples=0, result=result))
    monkeypatch.setattr("opensora_dist.train.logbook.time.perf_counter", iter([5.0, 6.0]).__next__)
    monkeypatch.setattr(dist, "all_gather", lambda ranks, local, group: ranks[0].copy_(local))
    assert [(s.step_s, s.data_wait_s) for s in book.flush()] == [(pytest.approx(0.6), 0.01), (pytest.approx(0.6), 0.02)]
