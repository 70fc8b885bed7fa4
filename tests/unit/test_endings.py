"""What a rank says of its end: by its own error or another's, once, and never at the cost of the run."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opensora_dist.cli.main import main
from opensora_dist.core.errors import CheckpointError, CommunicationError, ConfigError, DataError, DeviceError, TrainingError
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.resilience.endings import (
    ENDINGS_VARIABLE,
    Ended,
    Ending,
    ended_by,
    note_ending,
    noted,
    read_endings,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(ENDINGS_VARIABLE, str(tmp_path / "endings" / "7.0"))
    monkeypatch.setenv("RANK", "1")
    return tmp_path / "endings" / "7.0"


def _of(folder):
    return read_endings(folder, world=2)[1]


def _caused(error, cause):
    error.__cause__ = cause
    return error


def _gloo(text):
    return RuntimeError(f"[../third_party/gloo/gloo/transport/tcp/pair.cc:547] {text} [127.0.0.1]:1234")


_NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.27.5\n{}"


@pytest.mark.parametrize(
    "error, ending",
    [
        (ConfigError("run.steps=0 must be above 0"), Ending.CONFIG),
        (DataError("shard 3 is damaged"), Ending.ERROR),
        (TrainingError("10 steps in a row were skipped"), Ending.ERROR),
        (ValueError("a mistake of ours"), Ending.ERROR),
        (SystemExit(2), Ending.CONFIG),
        (SystemExit(0), Ending.DONE),
        (KeyboardInterrupt(), Ending.STOPPED),
        # Another rank's death, as backends and their wrappers say it.
        (_gloo("Connection closed by peer"), Ending.LOST),
        (_gloo("Connection reset by peer"), Ending.LOST),
        (_caused(CommunicationError("rank 1 lost contact"), _gloo("Connection closed by peer")), Ending.LOST),
        (_caused(CommunicationError("outer"), _caused(CommunicationError("inner"), _gloo("timed out"))), Ending.LOST),
        (dist.DistStoreError("wait timeout after 60000ms"), Ending.LOST),
        (dist.DistNetworkError("The client socket has timed out"), Ending.LOST),
        (
            dist.DistBackendError(_NCCL.format("remote process exited or there was a network error", "ncclRemoteError: ...")),
            Ending.LOST,
        ),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), Ending.LOST),
        # Ranks that are about to do different things would be so again.
        (CommunicationError("ranks are about to train on different data, or in another order"), Ending.ERROR),
        # Memory that is too small is so again.
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Ending.ERROR),
        (torch.AcceleratorError("CUDA error: out of memory"), Ending.ERROR),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Ending.ERROR),
        (dist.DistBackendError(_NCCL.format("unhandled cuda error", "Last error: Cuda failure 2 'out of memory'")), Ending.ERROR),
        (MemoryError(), Ending.ERROR),
        # What a mistake in a kernel or an index says.
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), Ending.ERROR),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Ending.ERROR),
        (
            dist.DistBackendError(_NCCL.format("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage")),
            Ending.ERROR,
        ),
        # What a mistake doesn't say.
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), Ending.DEVICE),
        (torch.AcceleratorError("CUDA error: an illegal instruction was encountered"), Ending.DEVICE),
        (torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"), Ending.DEVICE),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), Ending.DEVICE),
        (RuntimeError("No CUDA GPUs are available"), Ending.DEVICE),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"), Ending.DEVICE),
        (DeviceError("run.device=cuda, but torch sees no CUDA device here"), Ending.DEVICE),
        (dist.DistBackendError(_NCCL.format("unhandled system error", "ncclSystemError: System call failed")), Ending.DEVICE),
        (_caused(CommunicationError("rank 1 lost contact"), dist.DistBackendError("ncclSystemError: ...")), Ending.DEVICE),
        (
            dist.DistBackendError(_NCCL.format("unhandled cuda error", "Cuda failure 214 'uncorrectable ECC error'")),
            Ending.DEVICE,
        ),
        # A machine that no longer reaches its files, and a disk that is full on all of them.
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), Ending.DEVICE),
        (_caused(CheckpointError("checkpoint failed"), OSError(errno.EIO, "Input/output error")), Ending.DEVICE),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Ending.ERROR),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), Ending.ERROR),
    ],
    ids=lambda value: None if isinstance(value, Ending) else f"{type(value).__name__}-{str(value)[:40]}",
)
def test_an_error_says_whether_it_would_come_again(error, ending):
    assert ended_by(error).ending is ending


def test_what_the_wrapper_of_collectives_makes_of_a_lost_rank_is_lost_contact():
    with pytest.raises(CommunicationError) as raised, lost_contact_said(timeout_s=60):
        raise _gloo("Connection closed by peer")
    assert ended_by(raised.value).ending is Ending.LOST


def test_the_first_ending_counts_whoever_writes_it(folder):
    """The watchdog's thread and the main thread may end a rank at the same moment."""
    note_ending(Ended(ending=Ending.HANG, said="no progress for 90 s"))
    threads = [threading.Thread(target=note_ending, args=(Ended(ending=Ending.LOST, said=str(n)),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _of(folder) == Ended(ending=Ending.HANG, said="no progress for 90 s", host=platform.node())


@pytest.mark.parametrize("code, ending", [(0, Ending.DONE), (1, Ending.ERROR)])
def test_a_verb_that_returns_is_done_or_failed(folder, code, ending):
    assert noted(lambda: code) == code
    assert _of(folder).ending is ending


def test_a_run_that_has_saved_and_stopped_returns_0_and_is_not_done(folder):
    def body():
        note_ending(Ended(ending=Ending.STOPPED, said="saved step 5", signal="SIGUSR1"))
        return 0

    assert noted(body) == 0
    assert _of(folder).ending is Ending.STOPPED and _of(folder).signal == "SIGUSR1"


def test_when_torchrun_starts_ranks_again_the_last_start_counts(folder):
    note_ending(Ended(ending=Ending.LOST, said="of the start before"))
    assert noted(lambda: 0) == 0
    assert _of(folder).ending is Ending.DONE


def test_a_rank_that_is_killed_says_nothing_and_nor_does_its_earlier_start(folder):
    note_ending(Ended(ending=Ending.LOST, said="of the start before"))
    code = "import os, signal; from opensora_dist.resilience.endings import noted; noted(lambda: os.kill(os.getpid(), signal.SIGKILL))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert _of(folder) == Ended(ending=Ending.KILLED)


def test_what_was_cut_off_says_nothing(folder):
    folder.mkdir(parents=True)
    for text in ("", '{"ending": "do', '{"ending": "fine", "said": "", "signal": null}', "[]", "{}"):
        (folder / "rank-1.json").write_text(text)
        assert _of(folder) == Ended(ending=Ending.KILLED)


def test_on_a_full_disk_the_ending_goes_to_stderr_and_the_process_to_its_own_end(folder, monkeypatch, capsys):
    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("opensora_dist.resilience.endings.os.write", full)
    with pytest.raises(ConfigError, match="as it was"):
        noted(lambda: (_ for _ in ()).throw(ConfigError("as it was")))
    said = capsys.readouterr().err
    assert "No space left on device" in said and '"ending": "config"' in said
    assert list(folder.iterdir()) == [], "half a file would keep a later word out"


def test_a_folder_that_can_not_be_made_costs_nothing(folder, capsys):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file")
    assert noted(lambda: 0) == 0
    assert "can't be written" in capsys.readouterr().err


def test_who_starts_ranks_has_nothing_to_say_for_them(folder, monkeypatch):
    """Its own exit code is that of a rank, which may have been killed."""
    monkeypatch.delenv("RANK")
    assert noted(lambda: 1) == 1
    assert not folder.exists()


@pytest.mark.parametrize("argv", [["train", "run.steps=0", "data.path=nowhere"], ["train", "--no-such-option"], ["no-such-verb"]])
def test_a_refusal_before_training_is_one_of_the_config(folder, argv, capsys):
    try:
        code = main(argv)
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert _of(folder).ending is Ending.CONFIG
    capsys.readouterr()


def test_a_record_holds_the_ending_in_words_and_the_host(folder):
    note_ending(Ended(ending=Ending.ERROR, said="x" * 10_000))
    record = json.loads((folder / "rank-1.json").read_text())
    assert record == {"ending": "error", "said": "x" * 2000, "signal": None, "host": platform.node()}
    assert Path(folder / "rank-1.json").stat().st_size < 4096
