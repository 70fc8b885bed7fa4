"""Site profiles: what can't be in a script is refused, all at once, and secrets by their names."""

from __future__ import annotations

import re

import pytest

from opensora_dist.config.site import SiteConfig, load_site, site_path
from opensora_dist.core.errors import ConfigError
from opensora_dist.launch.job import job_problems, time_limit_s, time_limit_text


def problems_of(tmp_path, text):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path / "site.yaml")
    return caught.value.problems


def test_no_file_is_all_defaults(monkeypatch, tmp_path):
    assert load_site(None) == SiteConfig()
    monkeypatch.setenv("OPENSORA_SITE", "site.yaml")
    assert str(site_path()) == "site.yaml"
    monkeypatch.setenv("OPENSORA_SITE", "")
    assert site_path() is None


def test_everything_wrong_is_said_at_once(tmp_path):
    said = problems_of(
        tmp_path,
        """
slurm: {partition: "a b", options: [reservation=x, "--a\\n#SBATCH --b"], signal_s: 1, qeueu: x}
node: {variables: {1A: x, HF_TOKEN: hf_secret, OK: "a\\0b"}, setup: ["export WANDB_API_KEY=abc"]}
container: {runtime: pyxis, mounts: ["/a b:/c", "/a:/b:rx"]}
""",
    )
    assert [p.split(":")[0].split("=")[0].split(" ")[0] for p in said] == [
        *("slurm.signal_s", "slurm.qeueu", "node.variables", "node.variables.1A", "node.variables.HF_TOKEN", "node.setup"),
        *("slurm.partition", "slurm.options", "slurm.options", "container.runtime", "container.mounts", "container.mounts"),
    ]
    assert not [p for p in said if "hf_secret" in p and "NUL" not in p]


@pytest.mark.parametrize(
    "name, value, refused",
    [
        ("HF_TOKEN", "hf_x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("AWS_ACCESS_KEY_ID", "x", True),
        ("DB_PASSWORD", "x", True),
        ("HF_TOKEN_READ", "hf_x", True),
        ("PGPASS", "hf_x", True),
        ("MYSQL_PWD", "hf_x", True),
        ("GITHUB_PAT", "hf_x", True),
        ("WANDB_API_KEY", "/abc", True),
        ("HF_TOKEN_PATH", "/home/me/token", False),
        ("MAX_TOKENS", "16384", False),
        ("NCCL_IB_PKEY", "0x8001", False),
        ("NO_BYPASS", "everywhere", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcs.json", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("NCCL_DEBUG", "INFO", False),
    ],
)
def test_a_secret_is_refused_by_its_name_wherever_it_stands(tmp_path, name, value, refused):
    for text in (
        f"node: {{variables: {{{name}: '{value}'}}}}",
        f"node: {{setup: ['export {name}={value}']}}",
        f"slurm: {{options: ['--export=ALL,{name}={value},A=b']}}",
    ):
        (tmp_path / "site.yaml").write_text(text)
        if refused:
            (said,) = problems_of(tmp_path, text)
            assert re.search(rf"\b{name}\b", said) and "leave it out" in said and "hf_x" not in said
        else:
            load_site(tmp_path / "site.yaml")


def test_a_secret_that_a_shell_reads_where_it_runs_may_be_named_and_only_there(tmp_path):
    (tmp_path / "site.yaml").write_text(
        "node: {setup: ['export HF_TOKEN=$MINE A_KEY=\"$(cat ~/key)\" http_proxy=http://$ME:$MINE@proxy:1']}"
    )
    load_site(tmp_path / "site.yaml")
    for text in ("node: {variables: {HF_TOKEN: $MINE}}", "slurm: {options: ['--export=HF_TOKEN=$MINE']}"):
        (said,) = problems_of(tmp_path, text)
        assert re.search(r"\bHF_TOKEN\b", said)


@pytest.mark.parametrize(
    "text",
    [
        "node: {variables: {https_proxy: 'http://me:s3cr3t@proxy:3128'}}",
        "node: {setup: ['export https_proxy=http://me:s3cr3t@proxy:3128']}",
        "node: {setup: ['pip install git+https://s3cr3t@example.com/x']}",
        "slurm: {options: ['--export=ALL,http_proxy=http://me:s3cr3t@proxy']}",
        "sky: {file_mounts: {/data: 'https://me:s3cr3t@example.com/x'}}",
        "container: {image: 'docker://me:s3cr3t@example.com/image'}",
    ],
)
def test_a_password_in_a_url_is_refused_wherever_it_stands(tmp_path, text):
    (said,) = problems_of(tmp_path, text)
    assert "holds a URL with a user or password" in said and "s3cr3t" not in said


def test_a_url_that_holds_no_password_is_left_alone(tmp_path):
    lines = [
        "pip install git+ssh://git@example.com/x",
        "curl http://proxy:3128/a@b",
        "A=s3://bucket/a@b",
        "B=docker:x/y@sha256:0a",
    ]
    (tmp_path / "site.yaml").write_text(f"node: {{setup: {lines}}}")
    load_site(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("24:00:00", 86400),
        ("2-00:00:30", 172830),
        ("00:01:00", 60),
        ("100:00:00", 360000),
        ("0:00:00", None),
        ("1h", None),
        ("60", None),
        ("01:60:00", None),
        ("1-00", None),
    ],
)
def test_a_time_limit_is_hours_or_days(text, seconds):
    assert time_limit_s(text) == seconds
    if seconds is not None:
        assert time_limit_s(time_limit_text(seconds)) == seconds


@pytest.mark.parametrize("name", ["a b", "it's", "", "-x", "ä", "x" * 49, "a\nb", "a/b", "$(x)"])
def test_a_name_that_some_scheduler_could_not_hold_is_refused(tmp_path, name):
    good = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": None, "time_limit": None, "max_requeues": 0, "array": None}
    (said,) = job_problems(name=name, run_dir=tmp_path, **good)
    assert said.startswith("--name") and "pass --name" in said
    assert job_problems(name="a.b-c_1", run_dir=tmp_path, **good) == []
