"""Site profiles: what can't be in a script is refused, all at once, and secrets by their names."""

from __future__ import annotations

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
        ("HF_TOKEN", "$MINE", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcs.json", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("NCCL_DEBUG", "INFO", False),
    ],
)
def test_a_secret_is_refused_by_its_name_wherever_it_stands(tmp_path, name, value, refused):
    for text in (
        f"node: {{variables: {{{name}: '{value}'}}}}",
        f"node: {{setup: ['export {name}={value}']}}",
        f"slurm: {{options: ['--export=ALL,{name}={value}']}}",
    ):
        (tmp_path / "site.yaml").write_text(text)
        if refused:
            (said,) = problems_of(tmp_path, text)
            assert name in said and "leave it out" in said and "hf_x" not in said
        else:
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
