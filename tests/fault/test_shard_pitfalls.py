"""What goes wrong in silence with shards elsewhere, and can't here. Each test damages real shards; where webdataset is installed, the
same shards go through its own reader first, so that what is said of it stays true."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import warnings

import av
import numpy as np
import pytest
from dataset_factory import SPEC, write_dataset

from opensora_dist.cli.main import main
from opensora_dist.config.load import dump_yaml
from opensora_dist.config.train import CacheConfig, DataConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.tar import TarError, scan_tar
from opensora_dist.core.types import Thw
from opensora_dist.core.video import iter_frames
from opensora_dist.data.index import Index
from opensora_dist.data.order import build_order, micro_places
from opensora_dist.data.reader import Damage, ShardReader
from opensora_dist.data.remote import localise
from opensora_dist.parallel.keys import Keys

CLIP = (2, 32, 32)
SAMPLES = 10


@pytest.fixture
def folder(tmp_path):
    """One shard of ten samples, as others would pack it too: a description lies beside it."""
    path = tmp_path / "set"
    write_dataset(path, samples={CLIP: SAMPLES}, shard_samples=SAMPLES)
    (path / "dataset.yaml").write_text(dump_yaml(SPEC))
    return path


def _members(shard):
    with open(shard, "rb") as file:
        return list(scan_tar(file.fileno(), shown=shard.name))


def _ours(folder):
    """The keys that the index and the reader give, and the damage they tell of."""
    index = Index.open(folder, max_lost=SAMPLES)
    samples = ShardReader(index).try_read(range(len(index)))
    damage = {index.key[row]: sample for row, sample in enumerate(samples) if isinstance(sample, Damage)}
    return [key for key in index.key if key not in damage], damage


def _as_foreign(folder, tmp_path):
    """The same tars without our index: they are indexed on first use."""
    for path in folder.glob("index*"):
        path.unlink()
    return localise(str(folder), cache=CacheConfig(path=str(tmp_path / "cache")), allow_pipe=False)


def _webdataset():
    return pytest.importorskip("webdataset", reason="its own pitfall is shown where it is installed")


def _theirs(shards, **options):
    """What webdataset's reader gives, member by member and undecoded: keys, in order, and no error."""
    wds = _webdataset()
    urls = [str(shard) for shard in (shards if isinstance(shards, list) else [shards])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False, **options))


def _edit(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


# --- damage


def _damaged_header(folder):
    """The header of the fifth sample's first member; which byte hardly matters."""
    shard = folder / "shard-00000.tar"
    at = _members(shard)[8].offset - 512
    _edit(shard, lambda content: content.__setitem__(at + 110, content[at + 110] ^ 1))
    return shard, at


def test_a_damaged_header_ends_webdatasets_shard_in_silence(folder):
    shard, _ = _damaged_header(folder)
    assert len(_theirs(shard)) == 4, "of ten, and no error"


def test_a_damaged_header_costs_no_sample_of_an_indexed_shard_and_is_an_error_where_headers_are_read(folder, tmp_path):
    shard, at = _damaged_header(folder)
    keys, damage = _ours(folder)
    assert len(keys) == SAMPLES and not damage
    with pytest.raises(DataError, match=rf"{shard.name}: at offset {at}: a header's checksum"):
        _as_foreign(folder, tmp_path)


def _cut_at_a_member(folder):
    shard = folder / "shard-00000.tar"
    at = _members(shard)[12].offset - 512
    with open(shard, "r+b") as file:
        file.truncate(at)
    return shard, at


def test_a_cut_between_members_ends_webdatasets_shard_in_silence(folder):
    shard, _ = _cut_at_a_member(folder)
    assert len(_theirs(shard)) == 6, "of ten, and no error"


def test_a_cut_between_members_is_damage_of_what_is_gone_and_an_error_where_headers_are_read(folder, tmp_path):
    shard, at = _cut_at_a_member(folder)
    with pytest.raises(DataError, match=rf"{shard.name}: {at:,} bytes, expected"):
        Index.open(folder)
    keys, damage = _ours(folder)
    assert (len(keys), len(damage)) == (6, 4)
    assert all(d.shard == shard.name and "the file ends" in d.reason for d in damage.values())
    with pytest.raises(DataError, match=rf"{shard.name}: at offset {at}: the file ends"):
        _as_foreign(folder, tmp_path)


def test_a_cut_inside_a_member_is_found_alike(folder, tmp_path):
    shard = folder / "shard-00000.tar"
    member = _members(shard)[12]
    with open(shard, "r+b") as file:
        file.truncate(member.offset + member.size // 2)
    keys, damage = _ours(folder)
    assert (len(keys), len(damage)) == (6, 4)
    with pytest.raises(DataError, match=rf"{shard.name}: at offset {member.offset - 512}: member '{member.name}' has"):
        _as_foreign(folder, tmp_path)


def _flipped_payload(folder):
    shard = folder / "shard-00000.tar"
    member = _members(shard)[6]
    _edit(
        shard, lambda content: content.__setitem__(member.offset + member.size - 9, content[member.offset + member.size - 9] ^ 4)
    )
    return shard, member.name.partition(".")[0]


def test_a_flipped_bit_of_a_payload_passes_webdataset(folder):
    whole = _theirs(folder / "shard-00000.tar")
    shard, key = _flipped_payload(folder)
    found = _theirs(shard)
    assert len(found) == SAMPLES
    assert [a["__key__"] for a, b in zip(whole, found) if a["latents.npy"] != b["latents.npy"]] == [key]


def test_a_flipped_bit_of_a_payload_is_damage_of_its_sample_alone(folder):
    shard, key = _flipped_payload(folder)
    keys, damage = _ours(folder)
    assert list(damage) == [key] and len(keys) == SAMPLES - 1
    assert damage[key].shard == shard.name and "xxh3" in damage[key].reason and "frame 1" in damage[key].reason


def _bad_member_in_the_middle(tmp_path):
    """A member with a long name, whose second header is damaged: tarfile raises rather than stops."""
    shard = tmp_path / "long" / "x.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(6):
            info = tarfile.TarInfo(f"{'long-' * 30}{i}.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    at = _members(shard)[2].offset - 512
    _edit(shard, lambda content: content.__setitem__(at + 110, content[at + 110] ^ 1))
    return shard, at


def test_warn_and_continue_drops_the_rest_of_webdatasets_shard(tmp_path):
    shard, _ = _bad_member_in_the_middle(tmp_path)
    wds = _webdataset()
    with pytest.raises(tarfile.ReadError):
        _theirs(shard)
    assert len(_theirs(shard, handler=wds.warn_and_continue)) == 2, "of five that are whole"


def test_a_bad_member_is_an_error_with_its_offset_whatever_its_name(tmp_path):
    shard, at = _bad_member_in_the_middle(tmp_path)
    with pytest.raises(TarError, match=rf"at offset {at}:"):
        _members(shard)


@pytest.mark.parametrize("row", range(SAMPLES))
def test_one_bad_sample_leaves_all_others_of_its_shard(folder, row):
    place = Index.open(folder).latents_place(row)
    _edit(folder / "shard-00000.tar", lambda content: content.__setitem__(place.offset, content[place.offset] ^ 1))
    keys, damage = _ours(folder)
    assert len(damage) == 1 and len(keys) == SAMPLES - 1


# --- code, and names that point elsewhere


def _add(shard, members):
    with tarfile.open(shard, "a", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_decoding_as_webdataset_does_by_default_runs_what_is_in_the_shard(folder, tmp_path):
    flag = tmp_path / "ran"
    _add(folder / "shard-00000.tar", [(tarfile.TarInfo("zz.pyd"), f"cos\nmkdir\n(S'{flag}'\ntR.".encode())])
    wds = _webdataset()
    list(wds.WebDataset([str(folder / "shard-00000.tar")], shardshuffle=False, empty_check=False).decode())
    assert flag.is_dir()


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth", "pt"])
def test_code_in_a_shard_is_refused_and_never_run(folder, tmp_path, ending):
    flag = tmp_path / "ran"
    _add(folder / "shard-00000.tar", [(tarfile.TarInfo(f"zz.{ending}"), f"cos\nmkdir\n(S'{flag}'\ntR.".encode())])
    with pytest.raises(DataError, match=rf"member zz\.{ending} is code"):
        _as_foreign(folder, tmp_path)
    assert not flag.exists()


def test_webdataset_hands_on_names_that_point_out_of_the_shard(folder):
    _add(folder / "shard-00000.tar", [(tarfile.TarInfo("../../escaped.txt"), b"x")])
    assert "../../escaped" in [sample["__key__"] for sample in _theirs(folder / "shard-00000.tar")]


@pytest.mark.parametrize("name", ["../../escaped.txt", "/tmp/escaped.txt"])
def test_names_that_point_out_of_the_shard_are_refused(folder, tmp_path, name):
    _add(folder / "shard-00000.tar", [(tarfile.TarInfo(name), b"x")])
    with pytest.raises(DataError, match="points out of the tar"):
        _as_foreign(folder, tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"), [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.CHRTYPE, "device")]
)
def test_links_and_devices_are_refused(folder, tmp_path, kind, said):
    info = tarfile.TarInfo("zz.npy")
    info.type, info.linkname = kind, "/etc/passwd"
    _add(folder / "shard-00000.tar", [(info, b"")])
    with pytest.raises(DataError, match=f"'zz.npy' is .*{said}"):
        _as_foreign(folder, tmp_path)


# --- ranks and epochs


@pytest.fixture
def uneven(tmp_path):
    """Shards of unlike length: 26 samples, in tars of 10, 10 and 6."""
    path = tmp_path / "uneven"
    write_dataset(path, samples={CLIP: 26}, shard_samples=10)
    return path


def test_uneven_shards_give_webdatasets_ranks_unlike_numbers_of_batches(uneven, monkeypatch):
    wds = _webdataset()
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        urls = sorted(map(str, uneven.glob("*.tar")))
        data = wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False).batched(2)
        counts.append(sum(1 for _ in data))
    assert counts == [5, 5, 3], "the third rank ends first, and the others wait for it"


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_uneven_shards_give_every_rank_the_same_number_of_batches(uneven, world):
    order = build_order(Index.open(uneven), DataConfig(global_batch=6), keys=Keys(0))
    batches = [order.batch(step) for step in range(2 * order.batches_per_epoch)]
    for batch in batches:
        units = [len(unit) for unit in batch.units]
        shares = [micro_places(units, data_rank=rank, data_size=world, accum=1, micro=0) for rank in range(world)]
        assert {len(share) for share in shares} == {6 // world}
        assert [place for share in shares for place in share] == list(range(6))


def test_where_a_run_is_in_its_data_is_one_number_whatever_the_ranks_and_workers(uneven):
    """A run has nothing to save but its step: who starts at it sees what who came to it sees, on any number of ranks."""
    data = DataConfig(global_batch=6)
    gone = build_order(Index.open(uneven), data, keys=Keys(0))
    came = [gone.batch(step).rows for step in range(1001)][1000]
    for threads in (1, 4):
        fresh = build_order(Index.open(uneven), data.model_copy(update={"reader_threads": threads}), keys=Keys(0))
        assert fresh.batch(1000).rows == came
    assert len({gone.batch(step).digest for step in range(8)}) == 8


def test_buckets_that_drop_everything_fail_before_training_with_each_reason(tmp_path):
    write_dataset(tmp_path / "set", samples={(2, 32, 32): 3, (4, 32, 48): 2})
    with pytest.raises(DataError) as caught:
        build_order(Index.open(tmp_path / "set"), DataConfig(global_batch=8), keys=Keys(0))
    for part in (str(Thw(2, 32, 32)), str(Thw(4, 32, 48)), "3", "2", "data.global_batch"):
        assert part in str(caught.value)


# --- video


def _video(path, *, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(frames):
            picture = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _lie(path, frames):
    """Writes another number of frames into both headers of an .avi that tell it."""

    def change(content):
        struct.pack_into("<I", content, content.index(b"strh") + 8 + 32, frames)
        struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, frames)

    _edit(path, change)


def test_frames_are_counted_by_decoding_where_containers_lie_and_opencv_believes_them(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "lies.avi"
    _video(path, frames=20)
    _lie(path, 444)
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == 444
    assert sum(1 for _ in iter_frames(path)) == 20


def _prepared(tmp_path, videos, capsys, *overrides):
    args = [f"input.path={videos}", f"output.path={tmp_path / 'shards'}", "clip.fps=15", *overrides, "--json"]
    code = main(["data", "prepare", *args])
    return code, json.loads(capsys.readouterr().out)


def test_a_clip_is_cut_by_the_frames_there_are(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames in (("long", 20), ("short", 8)):
        _video(videos / f"{name}.avi", frames=frames)
        _lie(videos / f"{name}.avi", 444)
        (videos / f"{name}.txt").write_text("noise")
    code, report = _prepared(tmp_path, videos, capsys, "clip.buckets=[[16, 48, 64]]")
    assert (code, report["samples"]) == (0, 1)
    assert [os.path.basename(drop["source"]) for drop in report["dropped"]] == ["short.avi"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_corrupt_clip_does_not_end_a_preparation_and_its_reason_is_told(tmp_path, capsys, damage):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "bad", "c"):
        _video(videos / f"{name}.avi", frames=10)
        (videos / f"{name}.txt").write_text("noise")
    bad = videos / "bad.avi"
    content = bad.read_bytes()
    bad.write_bytes({"cut": content[: len(content) // 4], "noise": np.random.default_rng(0).bytes(5000), "empty": b""}[damage])
    code, report = _prepared(tmp_path, videos, capsys, "clip.buckets=[[8, 48, 64]]")
    assert (code, report["samples"]) == (0, 2)
    ((source, reason),) = [(os.path.basename(d["source"]), d["reason"]) for d in report["dropped"]]
    assert source == "bad.avi" and reason
    assert len(Index.open(tmp_path / "shards")) == 2
