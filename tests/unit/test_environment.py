"""environment.json: enough to run again, no secrets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from opensora_dist.observe import environment
from opensora_dist.observe.environment import REDACTED, describe_environment, redact, redact_command


def test_secrets_are_redacted_by_name_and_inside_urls() -> None:
    shown = redact(
        {
            "WANDB_API_KEY": "abc",
            "hf_token": "def",
            "MY_SECRET_THING": "x",
            "DbPassword": "y",
            "NCCL_DEBUG": "INFO",
            "HF_ENDPOINT": "https://user:pw@mirror.example/x",
        }
    )
    assert {k for k, v in shown.items() if v == REDACTED} == {"WANDB_API_KEY", "hf_token", "MY_SECRET_THING", "DbPassword"}
    assert shown["NCCL_DEBUG"] == "INFO"
    assert shown["HF_ENDPOINT"] == f"https://{REDACTED}@mirror.example/x"


def test_a_command_line_keeps_numbers_and_loses_secrets() -> None:
    args = [
        "train",
        "text.max_tokens=32",
        "--api-key",
        "abc",
        "token=xyz",
        "--max-tokens",
        "7",
        "--key=q",
        "--verbose",
        "config.yaml",
    ]
    assert redact_command(args) == [
        "train", "text.max_tokens=32", "--api-key", REDACTED, f"token={REDACTED}", "--max-tokens", "7", f"--key={REDACTED}",
        "--verbose", "config.yaml",
    ]  # fmt: skip


def test_the_description_is_json_and_names_what_matters(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-show")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SOME_PRIVATE_VARIABLE", "private")
    monkeypatch.setattr(sys, "argv", ["opensora-dist", "train", "secret=do-not-show"])
    described = describe_environment(world=4)
    text = json.dumps(described)
    assert described["world"] == 4
    assert described["packages"]["torch"]
    assert described["variables"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert described["variables"]["SLURM_JOB_ID"] == "4711"
    assert "do-not-show" not in text
    assert "private" not in text


def test_no_git_and_no_tree_are_tolerated(monkeypatch, tmp_path: Path) -> None:
    assert environment.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state(Path(environment.__file__).parent.parent) is None


@pytest.mark.parametrize(
    "program, said", [("/home/me/pkg/opensora_dist/__main__.py", "opensora-dist"), ("/opt/bin/toy.py", "toy.py")]
)
def test_a_command_holds_no_path_of_the_machine_it_was_installed_on(monkeypatch, program, said):
    monkeypatch.setattr("sys.argv", [program, "train", "run.steps=1"])
    assert describe_environment()["command"] == [said, "train", "run.steps=1"]
