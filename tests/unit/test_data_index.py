"""Opening an index: what fits is offered as arrays, what doesn't is refused with every problem named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_factory import SPEC, write_dataset

from opensora_dist.core import index as index_format
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, read_header, read_rows, write_index
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index, Place, verify_index
from opensora_dist.parallel import keys


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def rewrite(folder, *, spec=None, **values):
    """Writes the index of ``folder`` again with some cells of row 3 changed."""
    file = read_header(folder)
    written = write_dataset(folder.parent / "again", samples={(2, 16, 24): 7, (4, 16, 16): 5})
    rows = [w.row for w in written.values()]
    rows[3] = dataclasses.replace(rows[3], **values)
    write_index(folder, rows=rows, shards=file.shards, spec=spec or file.spec)


def test_an_index_offers_its_samples_by_bucket(folder):
    written = write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    index = Index.open(folder)
    assert len(index) == 12
    assert index.spec == SPEC.model_copy(update={"buckets": ((2, 16, 24), (4, 16, 16))})
    assert index.dataset_hash == read_header(folder).dataset_hash
    assert {b: len(rows) for b, rows in index.buckets.items()} == {Thw(2, 16, 24): 7, Thw(4, 16, 16): 5}
    for bucket, rows in index.buckets.items():
        for row in rows:
            stored = written[index.key[row]]
            assert index.clip_shape(row) == bucket
            assert index.latent_shape(row) == Thw(stored.latents.shape[0], *stored.latents.shape[2:])
            assert index.text_tokens[row] == len(stored.text)
            assert index.sample_id(row) == keys.sample_id(stored.row.key)
            assert index.shard_path(row) == folder / stored.row.shard
            assert index.latents_place(row) == Place(offset=stored.row.latents_offset, num_bytes=stored.row.latents_bytes)
            assert index.text_place(row) == Place(offset=stored.row.text_offset, num_bytes=stored.row.text_bytes)
            assert tuple(index.frame_hashes(row)) == stored.row.latents_frame_xxh3
            assert index.text_hash(row) == stored.row.text_xxh3
            assert (index.caption(row), index.source(row)) == (stored.row.caption, stored.row.source)
    assert list(index.key) == list(written) and index.key[-1 + len(index)] == list(written)[-1]
    assert index.sample_ids.tolist() == [keys.sample_id(key) for key in written]
    assert list(read_rows(folder)) == [w.row for w in written.values()]


def test_every_missing_and_short_shard_is_named(folder):
    write_dataset(folder, samples={(2, 16, 24): 22})
    (folder / "shard-00001.tar").unlink()
    short = folder / "shard-00003.tar"
    size = short.stat().st_size
    with open(short, "r+b") as handle:
        handle.truncate(size - 512)
    with pytest.raises(DataError) as error:
        Index.open(folder)
    text = str(error.value)
    assert "2 of 5 shards" in text
    assert "shard-00001.tar: missing" in text
    assert f"shard-00003.tar: {size - 512:,} bytes, expected {size:,}" in text
    assert "data prepare" in text


def test_shards_may_be_damaged_where_no_more_samples_than_allowed_lie_in_what_is_gone(folder, caplog):
    written = write_dataset(folder, samples={(2, 16, 24): 22})
    (folder / "shard-00001.tar").unlink()
    inside = written["clip-00017"].row  # of the four from 15 on, the third
    with open(folder / "shard-00003.tar", "r+b") as handle:
        handle.truncate(inside.text_offset + inside.text_bytes - 1)
    lost = 5 + 3
    index = Index.open(folder, max_lost=lost)
    assert len(index) == 22 and "2 of 5 shards" in caplog.text and f"{lost} samples are lost" in caplog.text
    with pytest.raises(DataError, match=f"{lost} samples are lost with them, more than resilience.max_bad_samples={lost - 1}"):
        Index.open(folder, max_lost=lost - 1)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such index"):
        Index.open(tmp_path)


def test_the_index_of_another_program_is_refused(tmp_path):
    pq.write_table(pa.table({"path": ["a.mp4"], "text": ["a"]}), tmp_path / INDEX_NAME)
    with pytest.raises(DataError, match="not an index of opensora_dist"):
        Index.open(tmp_path)


def save_table(folder, table, change=lambda header: header):
    """Writes another table, or another footer, in place of an index."""
    header = json.loads(pq.read_metadata(folder / INDEX_NAME).metadata[b"opensora_dist"])
    pq.write_table(table.replace_schema_metadata({"opensora_dist": json.dumps(change(header))}), folder / INDEX_NAME)


def change_header(folder, change):
    save_table(folder, pq.read_table(folder / INDEX_NAME), change)


def test_an_index_of_an_earlier_format_is_refused_by_its_version(folder):
    write_dataset(folder, samples={(2, 16, 24): 3})
    change_header(folder, lambda header: header | {"schema_version": 2})
    with pytest.raises(DataError, match="schema version 2, this release reads 3; prepare again"):
        Index.open(folder)


def test_the_hash_of_any_frame_is_part_of_the_data_sets_identity(folder):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    before, frames = read_header(folder), list(read_rows(folder))[3].latents_frame_xxh3
    rewrite(folder, latents_frame_xxh3=(*frames[:-1], frames[-1] ^ 1))
    assert read_header(folder).dataset_hash != before.dataset_hash
    rewrite(folder)
    assert read_header(folder).dataset_hash == before.dataset_hash
    assert len(list(folder.glob("*.xxh3"))) == 1, "hashes of an index that was replaced are removed"


def test_missing_and_short_hashes_are_named(folder):
    write_dataset(folder, samples={(2, 16, 24): 7})
    path = folder / read_header(folder).hashes_name
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match=rf"{path.name}: {len(content) - 8} bytes, expected {len(content)} bytes of hashes"):
        Index.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: missing, expected"):
        Index.open(folder)


def test_verifying_finds_what_opening_takes_on_trust(folder):
    write_dataset(folder, samples={(2, 16, 24): 7})
    assert verify_index(folder) == []
    path = folder / read_header(folder).hashes_name
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    (problem,) = verify_index(folder)
    assert path.name in problem and "expected" in problem
    content[9] ^= 1
    path.write_bytes(content)
    table = pq.read_table(folder / INDEX_NAME)
    keys_ = table.column("key").to_pylist()
    keys_[2] = keys_[3]
    save_table(folder, table.set_column(0, "key", pa.array(keys_)))
    found = "; ".join(verify_index(folder))
    assert "1 samples have another identity than the hash of their key" in found and "not that of the data set hash" in found


def test_an_index_without_samples_is_refused(folder):
    write_dataset(folder, samples={(2, 16, 24): 3})
    save_table(folder, pq.read_table(folder / INDEX_NAME).slice(0, 0))
    with pytest.raises(DataError, match="lists no sample"):
        Index.open(folder)


def test_a_description_of_another_release_is_refused(folder):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    spec = SPEC.model_dump(mode="json")
    del spec["fps"]
    rewrite(folder, spec=spec)
    with pytest.raises(DataError, match=r"(?s)does not fit this release.*fps"):
        Index.open(folder)


@pytest.mark.parametrize(
    "values, rule",
    [
        ({"shard": "other.tar"}, "sample 'clip-00003': its shard is not listed"),
        ({"dtype": "int16"}, "its precision is none of float16, float32"),
        ({"latents_bytes": 10}, "its latents' bytes do not match their shape"),
        ({"latents_frame_xxh3": (1, 2, 3)}, "its latents have not one hash per frame"),
        ({"latents_frame_xxh3": ()}, "its latents have not one hash per frame"),
        ({"text_bytes": 10}, "its text's bytes do not match their tokens"),
        ({"key": "clip-00000"}, "1 samples have the key of another sample"),
    ],
)
def test_samples_that_contradict_themselves_are_not_written_and_the_old_index_stays(folder, values, rule):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=rule):
        rewrite(folder, **values)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "values, rule",
    [
        ({"text_tokens": 0, "text_bytes": 0}, r"1 samples, first 'clip-00003': it has no text token"),
        ({"text_offset": 1 << 40}, r"1 samples, first 'clip-00003': its bytes lie outside its shard"),
        ({"latents_offset": -1}, r"1 samples, first 'clip-00003': its bytes lie outside its shard"),
        (
            {"clip_t": 4, "clip_h": 16, "clip_w": 16, "latent_t": 1, "latents_frame_xxh3": (1,)},
            "clips of 4x16x16 have latents of",
        ),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(folder, values, rule, monkeypatch):
    monkeypatch.setattr(index_format, "_check_clips", lambda shapes: None)  # of the writer, who would refuse the last
    written = write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    if "latent_t" in values:
        row = next(w.row for w in written.values() if w.row.clip_t == 2)
        values |= {"latents_bytes": row.latents_bytes // 2}
    rewrite(folder, **values)
    with pytest.raises(DataError, match=rule):
        Index.open(folder)


@pytest.mark.parametrize("column, number", [("shard", 3), ("shard", -1), ("shape", 2), ("shape", -1)])
def test_numbers_that_nothing_is_listed_for_are_refused(folder, column, number):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    table = pq.read_table(folder / INDEX_NAME)
    values = table.column(column).to_pylist()
    values[5] = number
    place = table.column_names.index(column)
    save_table(folder, table.set_column(place, column, pa.array(values, type=table.schema.field(column).type)))
    with pytest.raises(DataError, match=f"1 samples, first 'clip-00005': its {column} is not listed"):
        Index.open(folder)


def test_a_writer_refuses_one_clip_shape_with_two_latent_shapes(folder):
    written = write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    latents_bytes = next(w.row for w in written.values() if w.row.clip_t == 2).latents_bytes // 2
    values = {
        "clip_t": 4,
        "clip_h": 16,
        "clip_w": 16,
        "latent_t": 1,
        "latent_h": 2,
        "latent_w": 3,
        "latents_bytes": latents_bytes,
    }
    with pytest.raises(DataError, match=r"clips of 4x16x16 have latents of .* must name clips that differ"):
        rewrite(folder, **values, latents_frame_xxh3=(1,))


def test_shard_names_that_leave_the_folder_are_refused(folder):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    shutil.copy(folder / "shard-00000.tar", folder.parent / "outside.tar")
    shard = {"name": "../outside.tar", "num_bytes": 1, "num_samples": 1, "xxh3": "0"}
    change_header(folder, lambda header: header | {"shards": [shard] * 3})
    with pytest.raises(DataError, match=r"'\.\./outside\.tar': not a plain file name"):
        Index.open(folder)


def test_latent_statistics_of_another_channel_count_are_refused(folder):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    rewrite(folder, spec=SPEC.model_dump(mode="json") | {"latent_std": (1.0, 1.0, 0.0, 1.0)})
    with pytest.raises(DataError, match="latent_mean and latent_std must hold 4 values each, all of latent_std positive"):
        Index.open(folder)


def test_rows_of_a_bucket_are_all_rows_once(folder):
    write_dataset(folder, samples={(2, 16, 24): 7, (4, 16, 16): 5})
    rows = np.concatenate(list(Index.open(folder).buckets.values()))
    assert sorted(rows) == list(range(12))
