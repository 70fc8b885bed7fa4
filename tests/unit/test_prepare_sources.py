from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.prepare.sources import Source, scan_sources


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


def captions(sources: list[Source]) -> dict[str, str | None]:
    return {source.name: source.caption for source in sources}


def test_text_files_beside_clips_are_their_captions(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MOV", "in ner/übung 1.mkv", "notes.doc", ".b.partial-1.mp4")
    (tmp_path / "b.txt").write_text(" a red circle\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "in ner" / "übung 1.txt").write_text("größer", encoding="utf-8")
    assert captions(scan_sources(tmp_path)) == {"a.MOV": "", "b.mp4": "a red circle", "in ner/übung 1.mkv": "größer"}


def test_a_video_without_caption_among_others_is_kept_without_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text("x")
    assert captions(scan_sources(tmp_path)) == {"a.mp4": "x", "b.mp4": None}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_decides_which_videos_count(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "sub/c d.mp4")
    if kind == "csv":
        text = 'text,path,aes\n"a ""big"",\nred circle",./sub//c d.mp4,5\n12,a.mp4,6\n,gone.mp4,7\n'
        (tmp_path / "metadata.csv").write_text(text)
    else:
        rows = {"path": ["./sub//c d.mp4", "a.mp4", "gone.mp4"], "text": ['a "big",\nred circle', "12", ""]}
        pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    sources = scan_sources(tmp_path)
    assert captions(sources) == {"a.mp4": "12", "gone.mp4": "", "sub/c d.mp4": 'a "big",\nred circle'}
    assert [source.num_bytes for source in sources] == [5, -1, 5]


def test_csv_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_bytes("\ufeffpath,text\na.mp4,größer\n".encode())
    assert captions(scan_sources(tmp_path)) == {"a.mp4": "größer"}


def test_a_null_caption_of_a_table_is_no_caption(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "text": [None, "x"]}), tmp_path / "metadata.parquet")
    assert captions(scan_sources(tmp_path)) == {"a.mp4": None, "b.mp4": "x"}


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("x")
    before = scan_sources(tmp_path)
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    assert scan_sources(tmp_path) != before


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input\.path=.*no such folder"):
        scan_sources(tmp_path / "absent")


def test_no_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a.doc")
    with pytest.raises(DataError, match=r"no video or image in .*\.mp4"):
        scan_sources(tmp_path)


def test_an_empty_table_is_no_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("path,text\n")
    with pytest.raises(DataError, match=r"metadata\.csv lists no video"):
        scan_sources(tmp_path)


def test_no_captions_says_how_many_and_the_three_ways(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    with pytest.raises(DataError, match=r"none of 3 videos.*metadata\.parquet.*metadata\.csv.*\.txt"):
        scan_sources(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,caption\na.mp4,x\n")
    with pytest.raises(DataError, match=r"'text'.*\['path', 'caption'\]"):
        scan_sources(tmp_path)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "text": [1.5]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds double"):
        scan_sources(tmp_path)


def test_duplicate_paths_are_named_even_in_disguise(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,text\na.mp4,x\n./a.mp4,y\n")
    with pytest.raises(DataError, match=r"more than once \(a\.mp4\)"):
        scan_sources(tmp_path)


@pytest.mark.parametrize("path", ["../a.mp4", "/etc/a.mp4", "b/../../a.mp4", ""])
def test_paths_stay_inside_the_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "metadata.csv").write_text(f"path,text\nok.mp4,x\n{path},y\n")
    with pytest.raises(DataError, match=r"row 2 .*inside"):
        scan_sources(tmp_path)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"metadata\.parquet: can't be read"):
        scan_sources(tmp_path)


def test_two_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,text\na.mp4,x\n")
    pq.write_table(pa.table({"path": ["a.mp4"], "text": ["y"]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match="keep one"):
        scan_sources(tmp_path)


def test_captions_must_be_utf8(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"gr\xf6\xdfer")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        scan_sources(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"gr\xf6\xdfer.mp4"))
    with pytest.raises(DataError, match="not UTF-8"):
        scan_sources(tmp_path)
