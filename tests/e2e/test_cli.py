"""The whole way through the command line, tiny; and what it says and leaves where it can't go it."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from cli_process import cli, running
from dataset_factory import SPEC, write_dataset
from training import MODEL, SAMPLES, curve, events, metrics, overrides, train_here

from opensora_dist.cli.main import _VERBS, main
from opensora_dist.config.base import Section
from opensora_dist.config.codec import DiffusersCodecConfig, HfTextConfig
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.video import read_video

TRAIN = [*MODEL, "data.global_batch=4", "optim.lr=1e-3", "run.steps=6", "run.log_every=2", "run.device=cpu", "parallel.nproc=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def data(home):
    write_dataset(home / "data", samples=SAMPLES)
    return home / "data"


@pytest.fixture(scope="module")
def trained(home):
    """toy -> prepare -> train on two ranks; the run directory."""
    assert main(["data", "toy", str(home / "toy"), "--clips", "8", "--sizes", "32x48", "--lengths", "8", "--moves", "1"]) == 0
    prepare = ["input.path=" + str(home / "toy"), "output.path=" + str(home / "shards"), "clip.buckets=[[8, 32, 48]]"]
    assert main(["data", "prepare", *prepare]) == 0
    validation = ["validation.every_steps=3", "validation.prompts=[a red circle]", "validation.sampling_steps=2"]
    ended = cli("train", f"data.path={home / 'shards'}", f"run.dir={home / 'run'}", *TRAIN, *validation)
    assert ended.code == 0, ended.err
    return home / "run"


@pytest.fixture
def say(capsys):
    """Runs a verb in this process: (exit code, stderr)."""

    def run(*args):
        code = main([str(a) for a in args])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "verb", [[], *([v] for v in _VERBS), ["data", "toy"], ["data", "prepare"]], ids=lambda v: "-".join(v) or "top"
)
def test_help_of_each_verb_exits_0(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    assert ended.value.code == 0
    assert "usage: opensora-dist" in capsys.readouterr().out


def test_train_help_names_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())

    def keys(section):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            yield from keys(value) if isinstance(value, Section) else [(name, field.description or "")]

    missing = [name for name, description in keys(TrainConfig()) if f"{name}: " not in said or description not in said]
    assert not missing
    assert "steps: 1000 Optimizer steps." in said


def test_five_mistakes_are_reported_at_once_and_nothing_is_made(tmp_path, data):
    (tmp_path / "five.yaml").write_text(
        "run: {dir: made, stepz: 5, dtype: float8}\nmodel: {width: 30, heads: 4}\n"
        f"data: {{path: {data}, global_batch: 7}}\nparallel: {{nproc: 2}}\noptim: {{lr: fast}}\n"
    )
    ended = cli("train", "five.yaml", cwd=tmp_path)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    wanted = {
        "run.stepz": "did you mean 'steps'",
        "run.dtype": "must be one of",
        "model.heads=4": "must divide model.width=30",
        "data.global_batch=7": "use 8",
        "optim.lr": "write a number",
    }
    for field, remedy in wanted.items():
        assert any(field in line and remedy in line for line in ended.err.splitlines()), (field, ended.err)
    assert [p.name for p in tmp_path.iterdir()] == ["five.yaml"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["data.path=nowhere"], "data.path='nowhere' is not a folder"),
        (["model.patch=[2, 1, 1]"], "model.patch"),
        (["model.patch=[1, 4, 5]"], "model.patch"),
        (["data.global_batch=12"], "is more than any bucket"),
        (["validation.every_steps=2", "validation.prompts=[x]", "validation.clip=[3, 31, 48]"], "validation.clip"),
        (["validation.every_steps=2", "validation.prompts=[x]", "validation.sampler=ddim"], "validation.sampler"),
        (
            ["objective.name=iddpm", "validation.sampling_steps=2000"],
            "validation.sampling_steps=2000 exceeds objective.timesteps",
        ),
        (["objective.name=iddpm", "validation.sampler=ddpm", "validation.sampling_steps=1"], "validation.sampling_steps=1 with"),
        (["objective.name=iddpm", "objective.timesteps=20"], "objective.timesteps=20: input should be"),
        (["parallel.dp_replicate=3", "parallel.zero.stage=3"], "parallel.dp_replicate=3 must divide the 2 ranks"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_does_not_fit_is_said_before_a_rank_is_started(say, data, tmp_path, wrong, said):
    code, err = say("train", *overrides(data, tmp_path / "run", "parallel.nproc=2", *wrong))
    assert code == 2
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "foreign, said",
    [
        ({"text": HfTextConfig(path="nowhere")}, "opensora-dist[hf]"),
        ({"codec": DiffusersCodecConfig(path="/nowhere")}, "codec.path='/nowhere'"),
    ],
    ids=["text", "codec"],
)
def test_what_validation_and_trackers_lack_is_said_before_a_rank_is_started(say, tmp_path, monkeypatch, foreign, said):
    # diffusers, unlike us, takes a module that is None for one that is there.
    for package in ("tensorboard", "wandb", *(["transformers"] if "text" in foreign else [])):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write_dataset(tmp_path / "data", samples=SAMPLES, spec=SPEC.model_copy(update=foreign))
    wanted = ["validation.every_steps=2", "validation.prompts=[x]", "track.tensorboard=true", "track.wandb.mode=online"]
    code, err = say("train", *overrides(tmp_path / "data", tmp_path / "run", "parallel.nproc=2", *wanted))
    assert code == 2
    assert "4 problems" in err
    for sentence in (said, "track.tensorboard=true needs", "track.wandb.mode=online needs the package wandb", "WANDB_API_KEY"):
        assert sentence in err, (sentence, err)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_data_set_is_said_with_a_way_out(say, tmp_path):
    (tmp_path / "empty").mkdir()
    code, err = say("train", *overrides(tmp_path / "empty", tmp_path / "run", "parallel.nproc=2"))
    assert code == 2
    assert "data prepare" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["evaluate", "demo"])
def test_a_verb_that_needs_opencv_says_how_to_install_it(say, tmp_path, monkeypatch, verb):
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, err = say(verb, tmp_path / "out")
    assert code == 2
    assert "pip install 'opensora-dist[prepare]'" in err
    assert not (tmp_path / "out").exists()


def test_a_missing_config_and_an_unknown_verb_exit_2(say, tmp_path):
    code, err = say("train", tmp_path / "no.yaml")
    assert (code, "does not exist" in err) == (2, True)
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2


def test_toy_prepare_and_train_on_two_ranks_leave_a_whole_run(trained):
    assert [m["step"] for m in metrics(trained)] == list(range(1, 7))
    assert events(trained, "end")[0]["validation_failures"] == 0
    names = {p.name for p in trained.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "checkpoints", "samples", "report.html"}
    for step in (3, 6):
        assert (trained / "samples" / f"step-{step:08d}" / "000.mp4").is_file()
    assert not (trained / "STOPPED").exists()


def test_sample_evaluate_and_report_read_what_was_trained(say, trained, tmp_path):
    assert say("sample", trained, "--prompt", "a red circle moves left", "--count", 2, "--steps", 2)[0] == 0
    made = sorted(p.name for p in (trained / "samples" / "manual").iterdir())
    assert made == ["000-a-red-circle-moves-left.mp4", "001-a-red-circle-moves-left.mp4", "contact_sheet.png"]
    assert read_video(trained / "samples" / "manual" / made[0])[0].shape == (8, 32, 48, 3)
    assert say("evaluate", trained, "--count", 2, "--steps", 2, "--out", tmp_path)[0] == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["videos"] == 2 and set(result["rates"]) >= {"colour"}
    assert say("report", trained)[0] == 0
    assert "000.mp4" in (trained / "report.html").read_text() or "data:video" in (trained / "report.html").read_text()


def _draw(say, trained, out, *more):
    prompts = ["--prompt", "a red circle", "--prompt", "blue", "--prompt", "a large green square moves down"]
    assert say("sample", trained, *prompts, "--steps", 3, "--out", out, *more)[0] == 0
    return [read_video(path)[0].astype(int) for path in sorted(out.glob("*.mp4"))]


def test_the_batch_size_changes_no_video_and_the_seed_changes_all(say, trained, tmp_path):
    first = _draw(say, trained, tmp_path / "a")
    again = _draw(say, trained, tmp_path / "b")
    alone = _draw(say, trained, tmp_path / "c", "--batch", 1)
    other = _draw(say, trained, tmp_path / "d", "--seed", 1)
    assert len(first) == 3
    for one, same, single, different in zip(first, again, alone, other):
        assert (one == same).all()
        assert abs(one - single).max() <= 1
        assert abs(one - different).max() > 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        ([], "no prompt"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "x", "--clip", "8x32"], "FRAMESxHEIGHTxWIDTH"),
        (["--prompt", "x", "--clip", "8x33x48"], "33"),
        (["--prompt", "x", "--sampler", "ddpm"], "sampler"),
        (["--prompt", "x", "--steps", "0", "--batch", "0"], "--batch=0"),
        (["--prompt", "x", "--guided-channels", "99"], "guided"),
    ],
    ids=lambda v: " ".join(v) or "nothing" if isinstance(v, list) else "",
)
def test_a_wrong_wish_to_sample_exits_2_and_writes_nothing(say, trained, tmp_path, wrong, said):
    code, err = say("sample", trained, "--out", tmp_path / "out", *wrong)
    assert code == 2, err
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_prompt_file_that_is_not_utf_8_exits_2_and_names_the_line(say, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("a red circle\na grün one\n".encode("latin-1"))
    code, err = say("sample", tmp_path, "--prompt-file", prompts)
    assert (code, "prompts.txt: line 2 holds bytes that are not UTF-8" in err) == (2, True), err


def test_sampling_from_what_holds_no_checkpoint_exits_1_and_says_why(say, tmp_path):
    for folder, said in ((tmp_path / "gone", "no such folder"), (tmp_path, "no checkpoint")):
        code, err = say("sample", folder, "--prompt", "x")
        assert (code, said in err) == (1, True), err


def test_sigterm_to_the_command_saves_stops_with_0_and_the_same_command_goes_on_bitwise(ranks, data, tmp_path):
    def args(name):
        more = ["run.steps=80", "run.log_every=1", "parallel.nproc=2", "parallel.zero.stage=2", "checkpoint.every_steps=1000"]
        return ["train", *overrides(data, tmp_path / name, *more)]

    with running(*args("parts")) as command:
        command.wait_for(lambda: len(metrics(tmp_path / "parts")) >= 5)
        command.process.send_signal(signal.SIGTERM)
        ended = command.end()
    assert ended.code == 0, ended.err
    stopped = json.loads((tmp_path / "parts" / "STOPPED").read_text())
    assert 5 <= stopped["step"] < 80 and stopped["signal"] == "SIGTERM"
    assert "start the same command again" in ended.err
    # Again, under torchrun: our own launcher and torch's train the same run.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    again = cli(*args("parts"), launcher=torchrun)
    assert again.code == 0, again.err
    assert not (tmp_path / "parts" / "STOPPED").exists()
    ranks.run(train_here, args("whole")[1:], world=2)
    assert [m["step"] for m in metrics(tmp_path / "parts")] == list(range(1, 81))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
