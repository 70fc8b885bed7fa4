"""Real shards, damaged one way at a time: each damage is found, and named by shard and sample."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from dataset_factory import SPEC, Written, write_dataset
from stores import Store, serving

from opensora_dist.cli.main import main
from opensora_dist.config.load import dump_yaml
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import read_header, read_rows, write_index
from opensora_dist.core.io import hash_file
from opensora_dist.prepare.stats import ChannelSums, measured_stats
from opensora_dist.recipes.data_check import Check, check_data

Samples = dict[str, Written]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    """Twelve samples of two buckets in three shards."""
    return made(tmp_path_factory.mktemp("whole") / "set")


def made(folder: Path) -> tuple[Path, Samples]:
    """A data set whose statistics are those of its latents."""
    samples = write_dataset(folder, samples={(4, 32, 32): 7, (1, 32, 48): 5}, dtype="float32")
    stats = measured_stats(ChannelSums.add(ChannelSums.of(w.latents) for w in samples.values()))
    again(folder, latent_mean=list(stats.mean), latent_std=list(stats.std))
    return folder, samples


@pytest.fixture
def data(whole: tuple[Path, Samples], tmp_path: Path) -> tuple[Path, Samples]:
    """A copy to be damaged."""
    shutil.copytree(whole[0], tmp_path / "set")
    return tmp_path / "set", whole[1]


def check(folder: Path, **options: object) -> Check:
    return check_data(str(folder), workers=1, **options)  # type: ignore[arg-type]


def said(findings: tuple[object, ...]) -> str:
    return "\n".join(map(str, findings))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def again(folder: Path, change: Callable[[list], list] = lambda rows: rows, **spec: object) -> None:
    """Writes the index anew over the shards as they are: damage that whoever wrote it would not have seen."""
    header, rows = read_header(folder), list(read_rows(folder))
    shards = [replace(s, num_bytes=(folder / s.name).stat().st_size, xxh3=hash_file(folder / s.name)) for s in header.shards]
    write_index(folder, rows=change(rows), shards=shards, spec=header.spec | spec)


def pack(path: Path, change: Callable[[list], list]) -> None:
    """Writes a tar again with other members."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in change(members):
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def some(samples: Samples, *, clip_t: int = 4) -> Written:
    return next(w for w in samples.values() if w.row.clip_t == clip_t)


def test_a_whole_data_set_has_no_problem_and_no_warning(whole: tuple[Path, Samples]) -> None:
    found = check(whole[0])
    assert said(found.problems) == "" and said(found.warnings) == ""
    assert (found.samples, found.shards) == (12, 3)


def test_two_processes_find_what_one_finds(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    for w in list(samples.values())[::3]:
        overwrite(folder / w.row.shard, w.row.latents_offset + 5, b"x")
    assert check_data(str(folder), workers=2) == check(folder)
    assert len(check(folder).problems) > 4


def test_a_flipped_bit_of_latents_names_sample_frame_and_byte_and_the_shards_hash(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    row = some(samples).row
    frame = row.latents_bytes // 4
    overwrite(folder / row.shard, row.latents_offset + 2 * frame + 7, b"\x55")
    found = said(check(folder).problems)
    assert f"{row.shard}: {row.key}: its latents, frame 2, have another xxh3" in found
    assert f"from byte {row.latents_offset + 2 * frame:,} on" in found
    assert f"{row.shard}: xxh3 " in found and found.count("\n") == 1


def test_a_flipped_bit_of_text_names_the_sample(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    row = some(samples).row
    overwrite(folder / row.shard, row.text_offset, b"\x55\x55\x55")
    assert f"{row.shard}: {row.key}: its text vectors have another xxh3" in said(check(folder).problems)


def test_a_flipped_bit_of_a_header_names_the_byte_and_leaves_other_samples_whole(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    row = list(samples.values())[7].row
    header = row.latents_offset - 128 - 512
    overwrite(folder / row.shard, header + 3, b"\x55")
    found = said(check(folder).problems)
    assert f"{row.shard}: no whole tar: at offset {header}: a header's checksum" in found
    assert found.count("\n") == 1  # and the shard's own hash


@pytest.mark.parametrize("at", ["inside", "edge"])
def test_a_shard_that_was_cut_short_names_the_samples_that_are_lost(data: tuple[Path, Samples], at: str) -> None:
    folder, samples = data
    row = list(samples.values())[3].row
    os.truncate(folder / row.shard, row.latents_offset - 128 - 512 + (900 if at == "inside" else 0))
    found = said(check(folder).problems)
    assert f"{row.shard}: no whole tar" in found and "bytes, expected" in found
    for w in list(samples.values())[3:5]:
        assert f"{w.row.shard}: {w.row.key}: its latents end beyond the end of the file" in found
    assert list(samples.values())[2].row.key not in found and "shard-00001" not in found


def test_a_missing_shard_says_how_many_samples_are_lost_and_an_unlisted_one_is_named(data: tuple[Path, Samples]) -> None:
    folder, _ = data
    (folder / "shard-00001.tar").rename(folder / "other.tar")
    found = said(check(folder).problems)
    assert "shard-00001.tar: can't be opened (No such file or directory); 5 samples are lost with it" in found
    assert "other.tar: no shard of the index" in found


def test_nan_and_infinity_are_found_though_every_hash_is_right(tmp_path: Path) -> None:
    _, samples = made(tmp_path / "set")
    bad = list(samples.values())[1:3]
    for w, value, offset in zip(bad, (np.nan, np.inf), (bad[0].row.latents_offset, bad[1].row.text_offset), strict=True):
        overwrite(tmp_path / "set" / w.row.shard, offset, np.float32(value).tobytes())

    def rehash(rows: list) -> list:
        out = []
        for row in rows:
            raw = (tmp_path / "set" / row.shard).read_bytes()
            frame = row.latents_bytes // row.latent_t
            parts = [raw[row.latents_offset + i * frame :][:frame] for i in range(row.latent_t)]
            text = raw[row.text_offset :][: row.text_bytes]
            hashes = tuple(xxhash.xxh3_64_intdigest(p) for p in parts)
            out.append(replace(row, latents_frame_xxh3=hashes, text_xxh3=xxhash.xxh3_64_intdigest(text)))
        return out

    again(tmp_path / "set", rehash)
    found = check(tmp_path / "set").problems
    assert [(f.sample, f.what) for f in found] == [
        (bad[0].row.key, "its latents hold NaN or infinity"),
        (bad[1].row.key, "its text vectors hold NaN or infinity"),
    ]


def test_an_index_that_points_at_another_samples_bytes_is_caught(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    one, two = [w.row for w in samples.values() if w.row.clip_t == 4 and w.row.shard == "shard-00000.tar"][:2]

    def swap(rows: list) -> list:
        places = {one.key: two, two.key: one}
        return [
            replace(r, latents_offset=places[r.key].latents_offset, latents_frame_xxh3=places[r.key].latents_frame_xxh3)
            if r.key in places
            else r
            for r in rows
        ]

    again(folder, swap)
    found = said(check(folder).problems)
    assert f"{one.key}: its latents lie in '{two.key}.latents.npy', by the index, which is of another sample" in found


def test_an_index_that_points_past_the_start_of_an_array_is_caught(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    key = some(samples).row.key
    again(folder, lambda rows: [replace(r, latents_offset=r.latents_offset + (4 if r.key == key else 0)) for r in rows])
    found = said(check(folder).problems)
    assert (
        f"{key}: its latents lie in no member of the tar, by the index" in found and f"{key}: its latents, frames 0, 1" in found
    )


def test_an_array_of_another_type_or_shape_than_the_index_says_is_caught(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    key = some(samples).row.key
    shape = replace(some(samples).row, latent_h=2, latent_w=8)
    again(folder, lambda rows: [replace(shape, shard=r.shard, clip_h=16, clip_w=64) if r.key == key else r for r in rows])
    assert f"{key}: its latents are float32 [4, 4, 4, 4] in {key}.latents.npy, float32 [4, 4, 2, 8] in the index" in said(
        check(folder).problems
    )


def test_links_names_twice_and_members_apart_are_caught(data: tuple[Path, Samples]) -> None:
    folder, _ = data
    link = tarfile.TarInfo("x.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pack(folder / "shard-00000.tar", lambda members: [(link, b""), *members])
    pack(folder / "shard-00001.tar", lambda members: [*members, members[0]])
    found = said(check(folder).problems)
    assert "shard-00000.tar: no whole tar: at offset 0: member 'x.txt' is a symbolic link" in found
    assert "shard-00001.tar: 2 members are called" in found and "do not follow each other" in found


def test_samples_that_the_index_does_not_list_are_named(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    gone = list(samples.values())[1].row.key
    again(folder, lambda rows: [row for row in rows if row.key != gone])
    found = said(check(folder).problems)
    assert "the index has 4 samples in it, and says that it holds 5" in found
    assert f"holds 1 samples that the index does not list ('{gone}')" in found


def test_a_damaged_file_of_hashes_is_told_apart_from_damaged_shards(data: tuple[Path, Samples]) -> None:
    folder, _ = data
    (hashes,) = folder.glob("index-*.xxh3")
    overwrite(hashes, 8, b"\x55")
    found = said(check(folder).problems)
    assert f"index.parquet: {hashes.name} has xxh3" in found


def test_empty_captions_and_statistics_of_other_latents_are_warnings(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    key = some(samples).row.key
    spec = read_header(folder).spec
    mean, std = list(spec["latent_mean"]), list(spec["latent_std"])
    mean[1], std[3] = mean[1] + std[1], 1.2 * std[3]
    again(folder, lambda rows: [replace(r, caption=" ") if r.key == key else r for r in rows], latent_mean=mean, latent_std=std)
    found = check(folder)
    assert not found.problems
    assert f"{key}: its caption is empty" in said(found.warnings)
    off = [f.what for f in found.warnings if "channel" in f.what]
    assert [what.split(" have ")[0] for what in off] == ["latents of channel 1", "latents of channel 3"]


def test_a_json_that_says_something_else_than_the_index_is_caught(data: tuple[Path, Samples]) -> None:
    folder, samples = data
    key = next(iter(samples))
    info = tarfile.TarInfo(f"{key}.json")

    def add(members: list) -> list:
        return [*members[:2], (info, json.dumps({"caption": "another", "clip": [4, 32, 64]}).encode()), *members[2:]]

    pack(folder / "shard-00000.tar", add)
    found = said(check(folder).problems)
    assert f"{key}: its caption is 'another' in {key}.json, 'caption of {key}' in the index" in found
    assert f"{key}: its clip is [4, 32, 64] in {key}.json" in found


def test_a_data_set_behind_a_url_is_checked_through_the_cache(data: tuple[Path, Samples], tmp_path: Path) -> None:
    folder, samples = data
    row = some(samples).row
    (tmp_path / "train.yaml").write_text(f"data: {{cache: {{path: {tmp_path / 'cache'}}}}}")
    with serving(Store(files={f"set/{path.name}": path.read_bytes() for path in folder.iterdir()})) as store:
        found = check_data(f"{store.url}/set", workers=1, config=tmp_path / "train.yaml")
        assert not found.problems and found.samples == 12
    overwrite(folder / row.shard, row.text_offset, b"\x55\x55\x55")
    again(folder)  # the shard's own hash is right, so that it can be fetched; the text's is not
    with serving(Store(files={f"set/{path.name}": path.read_bytes() for path in folder.iterdir()})) as store:
        found = check_data(f"{store.url}/set", workers=1, config=tmp_path / "train.yaml")
        assert [(f.sample, f.what.split(",")[0]) for f in found.problems] == [
            (row.key, "its text vectors have another xxh3 than the index says")
        ]


def test_tars_that_others_made_are_checked_against_what_they_were_when_they_were_indexed(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def npy(*shape: int) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, rng.normal(size=shape).astype("float16"))
        return buffer.getvalue()

    members = {f"{i}.{kind}": npy(*shape) for i in range(4) for kind, shape in (("npy", (3, 4, 2, 6)), ("text.npy", (5, 8)))}
    members |= {f"{i}.json": b'{"caption": "theirs"}' for i in range(4)} | {"9.npy": npy(3, 4, 2, 6)}
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))
    (folder / "dataset.yaml").write_text(dump_yaml(SPEC.model_copy(update={"latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4})))
    (tmp_path / "train.yaml").write_text(f"data: {{cache: {{path: {tmp_path / 'cache'}}}}}")
    found = check_data(str(folder), workers=1, config=tmp_path / "train.yaml")
    assert said(found.problems) == "" and found.samples == 4
    assert "x.tar: holds 1 samples that the index does not list ('9')" in said(found.warnings)
    before = (folder / "x.tar").stat()
    overwrite(folder / "x.tar", 1024 + 512 + 128 + 10, b"\x55\x55")  # of the first sample's latents
    os.utime(folder / "x.tar", ns=(before.st_atime_ns, before.st_mtime_ns))  # or it would be indexed again, as it is now
    found = check_data(str(folder), workers=1, config=tmp_path / "train.yaml")
    assert "x.tar: x/0: its latents, frame 0, have another xxh3" in said(found.problems)


def test_damage_anywhere_in_the_index_is_told_and_never_a_crash(tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "set")
    index = folder / "index.parquet"
    whole, rng = index.read_bytes(), np.random.default_rng(0)
    content = (
        len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    )  # the footer comes after it, and has bytes that nothing reads
    for place in rng.integers(4, len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[place : place + 8] = rng.bytes(len(damaged[place : place + 8]))
        index.write_bytes(damaged)
        try:
            told = bool(check(folder).problems)
        except DataError:
            told = True
        assert told or place >= content, place


def test_no_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        check(tmp_path)


def test_the_command_exits_1_where_anything_is_wrong(data: tuple[Path, Samples], capsys: pytest.CaptureFixture[str]) -> None:
    folder, samples = data
    assert main(["data", "check", str(folder), "--workers", "1"]) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    row = some(samples).row
    overwrite(folder / row.shard, row.text_offset, b"\x55\x55\x55")
    assert main(["data", "check", str(folder), "--workers", "1", "--json"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["problems"][1]["sample"] == row.key and "error: 2 problems" in out.err
