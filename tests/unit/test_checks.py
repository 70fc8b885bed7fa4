"""What a run checks of its data set before it starts: once on each machine, and nothing is left open."""

from __future__ import annotations

from unittest import mock

import pytest
from dataset_factory import write_dataset
from training import SAMPLES, overrides

from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes import checks

RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.fixture
def config(tmp_path):
    write_dataset(tmp_path / "data", samples=SAMPLES)
    return load_config(TrainConfig, None, overrides=overrides(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize(
    "launched, opened",
    [
        pytest.param({}, 1, id="command"),
        pytest.param(RANK, 1, id="rank of another launcher"),
        pytest.param(RANK | {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}, 1, id="rank of torchrun"),
        pytest.param(RANK | {"TORCHELASTIC_RESTART_COUNT": "0"}, 0, id="rank of ours"),
        pytest.param(RANK | {"TORCHELASTIC_RESTART_COUNT": "1"}, 1, id="rank of ours, started again"),
    ],
)
def test_ranks_that_the_command_has_just_started_leave_the_check_of_the_data_set_to_it(config, monkeypatch, launched, opened):
    for name in (*RANK, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with mock.patch.object(checks, "open_data", wraps=checks.open_data) as opening:
        assert checks.training_problems(config) == []
    assert opening.call_count == opened


def test_a_data_set_that_no_model_fits_is_closed(config, monkeypatch):
    opened = []
    real = checks.open_data

    def open_data(*args, **kwargs):
        opened.append(real(*args, **kwargs))
        opened[0].shard_source.close = mock.Mock(wraps=opened[0].shard_source.close)
        return opened[0]

    monkeypatch.setattr(checks, "open_data", open_data)
    monkeypatch.setattr(checks, "meta_model", mock.Mock(side_effect=ConfigError("no model fits")))
    assert [p.message for p in checks.training_problems(config)] == ["no model fits"]
    opened[0].shard_source.close.assert_called_once()
