"""Tars that others made train like our own once they are indexed; what can't be used is counted by reason, what is code is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_factory import SPEC
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from opensora_dist.config.load import dump_yaml
from opensora_dist.config.train import CacheConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import read_header, read_rows
from opensora_dist.core.tar import Member
from opensora_dist.core.types import Thw
from opensora_dist.data import foreign_index
from opensora_dist.data.arrays import UnfitError, npy_place, safetensors_places
from opensora_dist.data.foreign import Layout, parse_layout
from opensora_dist.data.foreign_index import short_names
from opensora_dist.data.index import DataSet, Index
from opensora_dist.data.reader import Damage, ShardReader
from opensora_dist.data.remote import localise

T, C, H, W, Y, E = 3, 4, 2, 5, 4, 8
RNG = np.random.default_rng(0)


def _latents(t=T, dtype="float16"):
    return RNG.normal(size=(t, C, H, W)).astype(dtype)


def _text(tokens=Y, dtype="float16"):
    return RNG.normal(size=(tokens, E)).astype(dtype)


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "theirs"
    path.mkdir()
    (path / "dataset.yaml").write_text(dump_yaml(SPEC))
    return path


@pytest.fixture
def config(tmp_path):
    return CacheConfig(path=str(tmp_path / "cache"))


def _read(at):
    index = Index.join([DataSet(at=at)])
    samples = ShardReader(index).read(range(len(index)))
    return {index.key[row]: (s.latents.copy(), s.text.copy()) for row, s in enumerate(samples)}


def _one(folder, config, members, **layout):
    """The only sample of a tar with these members."""
    _pack(folder / "x.tar", members)
    (folder / "dataset.yaml").write_text(dump_yaml(Layout(**(SPEC.model_dump() | layout))))
    ((_, found),) = _read(localise(str(folder), cache=config, allow_pipe=False)).items()
    return found


def _refused(folder, config, members, **layout):
    _pack(folder / "x.tar", {"good.npy": _npy(_latents()), "good.text.npy": _npy(_text())} | members)
    (folder / "dataset.yaml").write_text(dump_yaml(Layout(**(SPEC.model_dump() | layout))))
    at = localise(str(folder), cache=config, allow_pipe=False)
    assert [row.key for row in read_rows(at.folder)] == ["x/good"]
    left = json.loads((at.folder / "left_out.json").read_text())
    (reason,) = left["dropped"]
    assert left["dropped"][reason] == ["x.tar: bad"]
    return reason


LATENTS, TEXT = _latents(), _text()
FORMS = {
    "latents.npy": {"k.latents.npy": _npy(LATENTS), "k.text.npy": _npy(TEXT)},
    "npy": {"k.npy": _npy(LATENTS), "k.text.npy": _npy(TEXT)},
    "safetensors": {"k.safetensors": save({"latents": LATENTS, "text": TEXT})},
    "text_embeds": {"k.safetensors": save({"latents": LATENTS, "text_embeds": TEXT[None], "other": np.zeros(3)})},
    "two files": {"k.latents.npy": _npy(LATENTS), "k.text.safetensors": save({"text": TEXT})},
    "batch axis": {"k.npy": _npy(LATENTS[None]), "k.text.npy": _npy(TEXT)},
    "mask": {
        "k.npy": _npy(LATENTS),
        "k.safetensors": save({"text": np.concatenate([TEXT, TEXT[:2]]), "text_mask": np.array([1, 1, 1, 1, 0, 0])}),
    },
    "mask of bools": {
        "k.npy": _npy(LATENTS),
        "k.text.npy": _npy(np.concatenate([TEXT, TEXT[:2]])),
        "k.text_mask.npy": _npy(np.array([[True] * 4 + [False] * 2])),
    },
    "in a folder": {"d/k.latents.npy": _npy(LATENTS), "d/k.text.npy": _npy(TEXT)},
}


@pytest.mark.parametrize("members", FORMS.values(), ids=FORMS)
def test_arrays_are_found_in_whichever_file_they_lie(folder, config, members):
    latents, text = _one(folder, config, members)
    np.testing.assert_array_equal(latents, LATENTS)
    np.testing.assert_array_equal(text, TEXT)


@pytest.mark.parametrize("axes", ["TCHW", "CTHW"])
def test_images_are_read_in_either_order_of_axes_and_without_a_time_axis(folder, config, axes):
    image = _latents(1)
    stored = image if axes == "TCHW" else image.transpose(1, 0, 2, 3)
    for array in (np.ascontiguousarray(stored), image[0]):
        latents, _ = _one(folder, config, {"k.npy": _npy(array), "k.text.npy": _npy(TEXT)}, axes=axes)
        np.testing.assert_array_equal(latents, image)


TURN = """
import io, sys, tarfile
import numpy as np

with tarfile.open(sys.argv[1]) as theirs, tarfile.open(sys.argv[2], "w") as ours:
    for member in theirs:
        content = theirs.extractfile(member).read()
        if member.name.endswith(".latents.npy"):
            array = np.load(io.BytesIO(content), allow_pickle=False)  # [C, T, h, w]
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array.transpose(1, 0, 2, 3)))
            content = buffer.getvalue()
        info = tarfile.TarInfo(member.name)
        info.size = len(content)
        ours.addfile(info, io.BytesIO(content))
"""


def test_video_with_channels_outermost_is_refused_with_the_lines_that_turn_it_around(folder, config, tmp_path):
    video = np.ascontiguousarray(LATENTS.transpose(1, 0, 2, 3))
    _pack(tmp_path / "theirs.tar", {"k.latents.npy": _npy(video), "k.text.npy": _npy(TEXT)})
    (folder / "x.tar").write_bytes((tmp_path / "theirs.tar").read_bytes())
    (folder / "dataset.yaml").write_text(dump_yaml(Layout(**SPEC.model_dump(), axes="CTHW").model_copy(update={"buckets": ()})))
    with pytest.raises(DataError, match=r"\[C, T, h, w\].*transpose\(1, 0, 2, 3\).*docs/remote\.md"):
        localise(str(folder), cache=config, allow_pipe=False)
    subprocess.run([sys.executable, "-c", TURN, str(tmp_path / "theirs.tar"), str(folder / "x.tar")], check=True)
    (folder / "dataset.yaml").write_text(dump_yaml(SPEC))
    ((latents, _),) = _read(localise(str(folder), cache=config, allow_pipe=False)).values()
    np.testing.assert_array_equal(latents, LATENTS)


def test_the_docs_show_the_lines_that_turn_a_tar_around_and_a_description_that_is_valid():
    docs = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()
    assert TURN.strip() in docs
    layout = parse_layout(docs.partition("```yaml\n")[2].partition("```")[0], shown="docs")
    assert set(Layout.model_fields) - layout.model_fields_set == {"buckets"}


OK_TEXT = {"bad.text.npy": _npy(TEXT)}
WRONG = {
    "no latents": (OK_TEXT, "no latents"),
    "no text": ({"bad.npy": _npy(LATENTS)}, "no text vectors"),
    "channels": ({"bad.npy": _npy(LATENTS[:, :2]), **OK_TEXT}, "2 channels"),
    "axes": ({"bad.npy": _npy(LATENTS[0, 0]), **OK_TEXT}, "2 axes"),
    "precision": ({"bad.npy": _npy(LATENTS.astype("float64")), **OK_TEXT}, "float64"),
    "bfloat16": ({"bad.safetensors": save_torch({"latents": torch.zeros(T, C, H, W, dtype=torch.bfloat16)}), **OK_TEXT}, "bf16"),
    "two precisions": ({"bad.npy": _npy(LATENTS.astype("float32")), **OK_TEXT}, "one precision"),
    "fortran": ({"bad.npy": _npy(np.asfortranarray(LATENTS)), **OK_TEXT}, "Fortran"),
    "big-endian": ({"bad.npy": _npy(LATENTS.astype(">f2")), **OK_TEXT}, "big-endian"),
    "cut npy": ({"bad.npy": _npy(LATENTS)[:-2], **OK_TEXT}, "another size"),
    "no npy": ({"bad.npy": b"hello", **OK_TEXT}, "no header"),
    "empty": ({"bad.npy": b"", **OK_TEXT}, "no header"),
    "no safetensors": ({"bad.safetensors": b"hello", **OK_TEXT}, "no header"),
    "lying safetensors": (
        {
            "bad.safetensors": (lambda h: len(h).to_bytes(8, "little") + h)(
                b'{"latents":{"dtype":"F16","shape":[9],"data_offsets":[0,18]}}'
            )
        },
        "no header",
    ),
    "text width": ({"bad.npy": _npy(LATENTS), "bad.text.npy": _npy(TEXT[:, :3])}, "not [tokens, 8]"),
    "long text": ({"bad.npy": _npy(LATENTS), "bad.text.npy": _npy(_text(7))}, "7 text tokens"),
    "no token": ({"bad.npy": _npy(LATENTS), "bad.text.npy": _npy(_text(0))}, "0 text tokens"),
    "gaps": ({"bad.npy": _npy(LATENTS), **OK_TEXT, "bad.text_mask.npy": _npy(np.array([1, 0, 1, 1]))}, "gaps"),
    "mask type": (
        {
            "bad.npy": _npy(LATENTS),
            "bad.safetensors": save_torch({"text": torch.zeros(Y, E).half(), "text_mask": torch.ones(Y).bfloat16()}),
        },
        "text_mask is bf16",
    ),
    "mask length": ({"bad.npy": _npy(LATENTS), **OK_TEXT, "bad.text_mask.npy": _npy(np.ones(3))}, "3 values for 4 tokens"),
    "deep json": ({"bad.npy": _npy(LATENTS), **OK_TEXT, "bad.json": b"[" * 100_000}, ".json can't be read"),
    "deep safetensors": ({"bad.safetensors": (99_999).to_bytes(8, "little") + b"[" * 99_999, **OK_TEXT}, "no header"),
    "json": ({"bad.npy": _npy(LATENTS), **OK_TEXT, "bad.json": b"{"}, ".json can't be read"),
}


@pytest.mark.parametrize(("members", "said"), WRONG.values(), ids=WRONG)
def test_a_sample_that_can_not_be_used_is_left_out_with_its_reason_and_the_others_stay(folder, config, members, said):
    assert said in _refused(folder, config, members)


def test_a_key_that_comes_twice_is_used_once(folder, config):
    _pack(
        folder / "x.tar",
        {"a.npy": _npy(LATENTS), "a.text.npy": _npy(TEXT), "b.txt": b"", "a.safetensors": save({"latents": LATENTS})},
    )
    at = localise(str(folder), cache=config, allow_pipe=False)
    dropped = json.loads((at.folder / "left_out.json").read_text())["dropped"]
    assert dropped["its key comes twice in its shard"] == ["x.tar: a"]
    assert [row.key for row in read_rows(at.folder)] == ["x/a"]


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth", "pt", "PKL", "latents.pt"])
def test_members_that_are_code_to_whoever_loads_them_are_refused_loudly(folder, config, ending):
    _pack(folder / "x.tar", {"k.npy": _npy(LATENTS), "k.text.npy": _npy(TEXT), f"k.{ending}": b"cos\nsystem\n(S'id'\ntR."})
    with pytest.raises(DataError, match=rf"x\.tar: member k\.{ending} is code"):
        localise(str(folder), cache=config, allow_pipe=False)


@pytest.mark.parametrize("name", ["k.npy", "k.extra.npy"])
def test_arrays_of_objects_are_refused_loudly_wherever_they_are(folder, config, name):
    members = {"k.latents.npy": _npy(LATENTS), "k.text.npy": _npy(TEXT), name: _npy(np.array([{}], dtype=object))}
    _pack(folder / "x.tar", members)
    with pytest.raises(DataError, match="Python objects, which are code"):
        localise(str(folder), cache=config, allow_pipe=False)


def test_what_means_nothing_here_is_passed_over_and_said_once(folder, config, caplog):
    members = {}
    for i in range(3):
        members |= {f"{i}.npy": _npy(LATENTS), f"{i}.text.npy": _npy(TEXT), f"{i}.jpg": b"x", f"{i}.cls": b"1"}
    _pack(folder / "x.tar", members | {"README": b"x"})
    localise(str(folder), cache=config, allow_pipe=False)
    (said,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert all(part in said for part in ("3 .jpg", "3 .cls", "1 no key"))


def test_captions_sources_and_clip_shapes_come_from_txt_and_json(folder, config):
    _pack(
        folder / "x.tar",
        {
            "a.npy": _npy(LATENTS),
            "a.text.npy": _npy(TEXT),
            "a.txt": "ein Hase läuft\n".encode(),
            "a.json": json.dumps({"caption": "not this", "url": "video.mp4", "clip": [3, 17, 41]}).encode(),
            "b.npy": _npy(LATENTS),
            "b.text.npy": _npy(TEXT),
        },
    )
    a, b = read_rows(localise(str(folder), cache=config, allow_pipe=False).folder)
    assert (a.caption, a.source, (a.clip_t, a.clip_h, a.clip_w)) == ("ein Hase läuft", "video.mp4", (3, 17, 41))
    assert (b.caption, b.source, (b.clip_t, b.clip_h, b.clip_w)) == ("", "x.tar: b", (T, H * 8, W * 8))


def _stating(clip, latents):
    return {"npy": _npy(latents), "text.npy": _npy(TEXT), "json": json.dumps({"clip": clip}).encode()}


def test_a_clip_that_does_not_fit_its_latents_is_taken_by_the_codecs_factors_and_said(folder, config, caplog):
    members = {f"a.{k}": v for k, v in _stating([3, 720, 1280], LATENTS).items()}
    wide = np.concatenate([LATENTS, LATENTS], axis=3)
    members |= {f"b.{k}": v for k, v in _stating([3, 720, 1280], wide).items()}
    _pack(folder / "x.tar", members)
    index = Index.join([DataSet(at=localise(str(folder), cache=config, allow_pipe=False))])
    assert [index.clip_shape(row) for row in range(2)] == [Thw(T, H * 8, W * 8), Thw(T, H * 8, 2 * W * 8)]
    assert "2 clip in .json that does not fit its latents" in caplog.text


def test_clips_that_stand_for_two_latent_shapes_are_taken_by_the_codecs_factors(folder, config, caplog):
    taller = np.concatenate([LATENTS, LATENTS[:, :, :1]], axis=2)
    members = {}
    for key, clip, latents in (("a", [3, 17, 41], LATENTS), ("b", [3, 17, 41], taller), ("c", [3, 16, 40], taller)):
        members |= {f"{key}.{k}": v for k, v in _stating(clip, latents).items()}
    _pack(folder / "x.tar", members | {f"d.{k}": v for k, v in _stating([3, 18, 40], LATENTS).items()})
    index = Index.join([DataSet(at=localise(str(folder), cache=config, allow_pipe=False))])
    low, high = Thw(T, H * 8, W * 8), Thw(T, (H + 1) * 8, W * 8)
    assert [index.clip_shape(row) for row in range(4)] == [low, high, high, Thw(3, 18, 40)]
    assert "2 samples have a clip of their own" in caplog.text


def test_halves_of_characters_in_a_caption_are_replaced(folder, config):
    _pack(
        folder / "x.tar",
        {"a.npy": _npy(LATENTS), "a.text.npy": _npy(TEXT), "a.json": b'{"caption": "x \\ud83d y", "clip": [1e9, 2, 3]}'},
    )
    (row,) = read_rows(localise(str(folder), cache=config, allow_pipe=False).folder)
    assert row.caption == "x ? y" and row.clip_t == T


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_whatever_bytes_the_header_of_an_array_holds_it_is_found_unfit_or_code(tmp_path):
    rng = np.random.default_rng(0)
    forms = {"a.npy": (_npy(LATENTS), npy_place), "a.safetensors": (save({"latents": LATENTS}), safetensors_places)}
    outcomes = set()
    for name, (content, place) in forms.items():
        with open(tmp_path / name, "w+b", buffering=0) as file:
            for _ in range(1500):
                broken = bytearray(content)
                for at in rng.integers(0, 150, rng.integers(1, 6)):
                    broken[at] = rng.integers(256)
                os.pwrite(file.fileno(), broken, 0)
                try:
                    place(file.fileno(), Member(name, 0, len(broken)), **({"shown": name} if place is npy_place else {}))
                    outcomes.add("read")
                except (UnfitError, DataError) as error:
                    outcomes.add(type(error).__name__)
    assert outcomes >= {"read", "UnfitError"}


def _two(folder):
    for name in ("x", "y"):
        _pack(
            folder / f"{name}.tar",
            {f"{i}.{k}": v for i in range(2) for k, v in {"npy": _npy(_latents()), "text.npy": _npy(TEXT)}.items()},
        )


def test_equal_keys_in_different_tars_are_different_samples(folder, config):
    _two(folder)
    assert sorted(_read(localise(str(folder), cache=config, allow_pipe=False))) == ["x/0", "x/1", "y/0", "y/1"]


def test_the_index_is_made_once_and_nothing_is_written_beside_the_tars(folder, config, monkeypatch):
    _two(folder)
    before = sorted(folder.iterdir())
    first = localise(str(folder), cache=config, allow_pipe=False)
    monkeypatch.setattr(foreign_index, "index_tar", None)
    assert localise(str(folder), cache=config, allow_pipe=False).folder == first.folder
    assert sorted(folder.iterdir()) == before


def test_a_tar_that_changed_is_noticed_and_it_alone_is_read_again(folder, config, monkeypatch):
    _two(folder)
    old = _read(localise(str(folder), cache=config, allow_pipe=False))
    _pack(folder / "y.tar", {"0.npy": _npy(_latents()), "0.text.npy": _npy(TEXT)})
    looked, real = [], foreign_index.index_tar
    monkeypatch.setattr(foreign_index, "index_tar", lambda fd, **kw: looked.append(kw["name"]) or real(fd, **kw))
    new = _read(localise(str(folder), cache=config, allow_pipe=False))
    assert looked == ["y.tar"]
    assert sorted(new) == ["x/0", "x/1", "y/0"]
    np.testing.assert_array_equal(new["x/1"][0], old["x/1"][0])
    assert (new["y/0"][0] != old["y/0"][0]).any()


def test_a_tar_that_changes_while_it_is_read_gives_damage_rather_than_wrong_samples(folder, config):
    _two(folder)
    index = Index.join([DataSet(at=localise(str(folder), cache=config, allow_pipe=False))])
    _pack(folder / "y.tar", {"9.npy": _npy(_latents(5)), "9.text.npy": _npy(TEXT)})
    samples = ShardReader(index).try_read(range(len(index)))
    assert [isinstance(s, Damage) for s in samples] == [key.startswith("y/") for key in index.key]


def test_another_description_is_another_data_set(folder, config):
    _two(folder)
    first = localise(str(folder), cache=config, allow_pipe=False)
    (folder / "dataset.yaml").write_text(dump_yaml(SPEC.model_copy(update={"fps": 24.0})))
    second = localise(str(folder), cache=config, allow_pipe=False)
    assert read_header(second.folder).spec["fps"] == 24.0 and read_header(first.folder).spec["fps"] == 8.0


def test_damaged_tars_are_named_all_at_once_with_their_offsets_and_the_rest_is_kept(folder, config):
    _two(folder)
    _pack(folder / "z.tar", {"0.npy": _npy(LATENTS), "0.text.npy": _npy(TEXT)})
    for name, cut in (("y", 700), ("z", 1024)):
        content = (folder / f"{name}.tar").read_bytes()
        (folder / f"{name}.tar").write_bytes(content[:cut])
    with pytest.raises(DataError) as caught:
        localise(str(folder), cache=config, allow_pipe=False)
    for part in ("2 of 3 tars", "y.tar: at offset", "z.tar: at offset", "leave them out of data.path"):
        assert part in str(caught.value)
    at = localise(f"{folder}/{{x,}}.tar".replace("{x,}", "x"), cache=config, allow_pipe=False)
    assert read_header(at.folder).num_samples == 2


def test_tars_without_a_single_sample_are_an_error_with_every_reason(folder, config):
    _pack(folder / "x.tar", {"a.npy": _npy(LATENTS), "b.text.npy": _npy(TEXT)})
    with pytest.raises(DataError, match=r"no sample .*no text vectors.*no latents"):
        localise(str(folder), cache=config, allow_pipe=False)


def test_without_a_description_the_error_says_what_to_write_where(folder, config):
    _two(folder)
    (folder / "dataset.yaml").unlink()
    with pytest.raises(DataError, match=r"made by others, and .*dataset\.yaml.*data\.layout"):
        localise(str(folder), cache=config, allow_pipe=False)


def test_a_wrong_description_is_refused_field_by_field(folder, config):
    _two(folder)
    (folder / "dataset.yaml").write_text("channels: 0\nnonsense: 1\n")
    with pytest.raises(ConfigError) as caught:
        localise(str(folder), cache=config, allow_pipe=False)
    assert all(field in str(caught.value) for field in ("channels", "nonsense", "text_width", "latent_mean"))
    (folder / "dataset.yaml").write_text(dump_yaml(SPEC.model_copy(update={"latent_std": (1.0, 0.0, 1.0, 1.0)})))
    with pytest.raises(ConfigError, match="latent_std"):
        localise(str(folder), cache=config, allow_pipe=False)


def test_an_unfinished_preparation_is_not_taken_for_foreign_tars(folder, config):
    _two(folder)
    (folder / ".prepare").mkdir()
    with pytest.raises(DataError, match="it resumes"):
        Index.join([DataSet(at=localise(str(folder), cache=config, allow_pipe=False))])


RANK = """
import sys
from opensora_dist.config.train import CacheConfig
from opensora_dist.core.tar import Member
from opensora_dist.data import foreign_index
from opensora_dist.data.arrays import UnfitError, npy_place, safetensors_places
from opensora_dist.data.remote import localise
real = foreign_index.index_tar
def looked(fd, **kw):
    open(sys.argv[3], "a").write("looked\\n")
    return real(fd, **kw)
foreign_index.index_tar = looked
print(localise(sys.argv[1], cache=CacheConfig(path=sys.argv[2]), allow_pipe=False).folder)
"""


def test_of_the_ranks_of_a_machine_one_makes_the_index(folder, config, tmp_path):
    _two(folder)
    args = [sys.executable, "-c", RANK, str(folder), config.path, str(tmp_path / "log")]
    ranks = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {rank.communicate(timeout=60)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0] and len(folders) == 1
    assert (tmp_path / "log").read_text() == "looked\n" * 2


def test_patterns_name_tars_of_several_folders(folder, config):
    for name in ("a", "b"):
        (folder / name).mkdir()
        _pack(folder / name / "0.tar", {"0.npy": _npy(LATENTS), "0.text.npy": _npy(TEXT)})
    layout = str(folder / "dataset.yaml")
    at = localise(f"{folder}/{{a,b}}/0.tar", cache=config, allow_pipe=False, layout=layout)
    assert sorted(_read(at)) == ["a/0/0", "b/0/0"]
    with pytest.raises(DataError, match=r"2\.tar: no such file"):
        localise(f"{folder}/a/{{0..2..}}.tar".replace("{0..2..}", "2"), cache=config, allow_pipe=False, layout=layout)


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["s3://b/d/x-0.tar", "s3://b/d/x-1.tar"], ["x-0.tar", "x-1.tar"]),
        (["https://h/a/0.tar?sig=1", "https://h/b/0.tar?sig=1"], ["a/0.tar", "b/0.tar"]),
        (["pipe:cat /d/0.tar", "pipe:cat /d/1.tar"], ["0.tar", "1.tar"]),
        (["pipe:get --shard 0", "pipe:get --shard 1"], ["0.tar", "1.tar"]),
        (["pipe:get 0 -", "pipe:get 1 -"], ["000000--.tar", "000001--.tar"]),
        (["/d/only.tar"], ["only.tar"]),
    ],
)
def test_shards_are_called_by_what_differs_in_their_places(places, names):
    assert short_names(places) == names


def test_only_what_is_needed_is_open_afterwards(folder, config):
    _two(folder)
    before = len(os.listdir("/proc/self/fd"))
    localise(str(folder), cache=config, allow_pipe=False)
    assert len(os.listdir("/proc/self/fd")) == before
