"""Arguments that several verbs share."""

from __future__ import annotations

import argparse

import pytest

from opensora_dist.cli.arguments import add_sampling_arguments, sampling_options
from opensora_dist.core.errors import ConfigError
from opensora_dist.train.generate import SamplingOptions


def _parser():
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    return parser


def test_sampling_has_one_set_of_defaults_and_the_help_says_them():
    options = sampling_options(_parser().parse_args(["run"]))["options"]
    assert options == SamplingOptions()
    said = " ".join(_parser().format_help().split())
    assert f"(default {options.steps})" in said and f"(default {options.cfg_scale})" in said


def test_what_is_given_is_taken_and_every_number_out_of_range_is_named():
    given = ["run", "--steps", "4", "--cfg-scale", "1", "--guided-channels", "3"]
    options = sampling_options(_parser().parse_args(given))["options"]
    assert options == SamplingOptions(steps=4, cfg_scale=1.0, guided_channels=3)
    with pytest.raises(ConfigError) as error:
        sampling_options(_parser().parse_args(["run", "--steps", "0", "--cfg-scale", "0", "--batch", "0", "--seed", "-1"]))
    assert [p.partition("=")[0] for p in error.value.problems] == ["--steps", "--batch", "--cfg-scale", "--seed"]
