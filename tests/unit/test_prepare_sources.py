from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import iter_frames, read_video, write_video
from opensora_dist.prepare.sources import Source, image_problem, require_captions, scan_sources


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


def captions(sources: list[Source]) -> dict[str, str | None]:
    return {source.name: source.caption for source in sources}


def problems(sources: list[Source]) -> dict[str, str | None]:
    return {source.name: source.problem for source in sources}


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
    with pytest.raises(DataError, match=r"none of 3 videos.*metadata\.parquet.*metadata\.csv.*\.txt.*caption\.model"):
        require_captions(scan_sources(tmp_path), folder=tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,caption\na.mp4,x\n")
    with pytest.raises(DataError, match=r"'text'.*\['path', 'caption'\]"):
        scan_sources(tmp_path)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "text": [1.5]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds double"):
        scan_sources(tmp_path)


def test_duplicate_paths_are_named_even_in_disguise_and_stop_no_other(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,text\na.mp4,x\n./a.mp4,y\nb.mp4,z\n")
    assert problems(scan_sources(tmp_path)) == {"a.mp4": "metadata.csv lists it more than once: 2 rows; keep one", "b.mp4": None}


@pytest.mark.parametrize("path", ["../a.mp4", "/etc/a.mp4", "b/../../a.mp4", ""])
def test_paths_stay_inside_the_folder_and_stop_no_other_row(tmp_path: Path, path: str) -> None:
    (tmp_path / "metadata.csv").write_text(f"path,text\nok.mp4,x\n{path},y\n")
    said = problems(scan_sources(tmp_path))
    assert said.pop("ok.mp4") is None
    ((name, problem),) = said.items()
    assert name == "metadata.csv, row 2" and f"its path can't be used: {path!r} must name a file inside" in str(problem)


def test_rows_of_other_bytes_or_columns_stop_no_other_row(tmp_path: Path) -> None:
    rows = [b"path,text,id", b"a.mp4,gr\xf6\xdfer,1", b"caf\xe9.mp4,x,2", b"c.mp4,one, two,3", b"d.mp4,fine,4"]
    (tmp_path / "metadata.csv").write_bytes(b"\n".join(rows))
    said = problems(scan_sources(tmp_path))
    assert said.pop("d.mp4") is None
    assert list(said) == ["a.mp4", "metadata.csv, line 4", "metadata.csv, row 2"]
    for problem, part in zip(
        said.values(), ("text in metadata.csv is not UTF-8", "number of columns: 4, expected 3", "can't decode"), strict=True
    ):
        assert part in str(problem)


def test_a_column_that_is_not_asked_for_may_hold_anything(tmp_path: Path) -> None:
    rows = [f"{i}.mp4,{'a caption ' * 6},{i}" for i in range(20000)]
    (tmp_path / "metadata.csv").write_text("\n".join(["path,text,id", *rows, "z.mp4,last,x7"]))
    assert len(scan_sources(tmp_path)) == 20001


def test_bytes_that_are_no_text_in_a_parquet_table_stop_no_other_row(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"gr\xf6", b"x"], pa.binary()).buffers())
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "text": texts}), tmp_path / "metadata.parquet")
    said = problems(scan_sources(tmp_path))
    assert "not UTF-8" in str(said["a.mp4"]) and said["b.mp4"] is None


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"metadata\.parquet: can't be read"):
        scan_sources(tmp_path)


def test_two_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,text\na.mp4,x\n")
    pq.write_table(pa.table({"path": ["a.mp4"], "text": ["y"]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match="keep one"):
        scan_sources(tmp_path)


def test_captions_and_names_must_be_utf8_and_stop_no_other_source(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", os.fsdecode(b"gr\xf6\xdfer.mp4"))
    (tmp_path / "a.txt").write_bytes(b"gr\xf6\xdfer")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").write_text("fine")
    said = problems(scan_sources(tmp_path))
    assert said.pop("c.mp4") is None
    assert list(said) == ["a.mp4", "b.mp4", r"gr\udcf6\udcdfer.mp4"]
    for problem, part in zip(
        said.values(), ("its .txt is not UTF-8 text: ", ".txt can't be read: Is a directory", "name is not UTF-8"), strict=True
    ):
        assert part in str(problem)


def test_links_to_folders_are_followed_once_whatever_circles_they_make(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.mp4", "in/deep/b.mp4", "elsewhere/c.mp4")
    for link, target in (("in/a link", "in/deep"), ("in/deep/up", "in"), ("in/more", "elsewhere"), ("in/again", "elsewhere")):
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    assert [source.name for source in scan_sources(tmp_path / "in")] == ["a.mp4", "again/c.mp4", "deep/b.mp4"]


def test_hidden_folders_and_data_sets_are_no_sources(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", ".cache/b.mp4", "shards/c.mp4", "shards/deep/d.mp4", "shards/.prepare/x")
    assert [source.name for source in scan_sources(tmp_path)] == ["a.mp4"]


def test_an_image_beside_a_video_of_its_name_is_a_thumbnail(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.mp4", "b.jpg", "sub/a.jpg")
    assert [source.name for source in scan_sources(tmp_path)] == ["a.mp4", "b.jpg", "sub/a.jpg"]


def pack(path: Path, members: Mapping[str, bytes], *, link: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)


def picture(*, height: int = 40, width: int = 60, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, width, 3))
    Image.fromarray(ramp.copy()).save(buffer, form, **options)
    return buffer.getvalue()


def only_frame(source: Source) -> np.ndarray:
    ((time_s, frame),) = iter_frames(source.open())
    assert time_s == 0
    return frame


@pytest.mark.parametrize(("name", "form"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")])
def test_an_image_is_a_source_of_one_frame(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_bytes(picture(form=form))
    (tmp_path / "a.txt").write_text("a ramp")
    (source,) = scan_sources(tmp_path)
    assert (source.kind, source.caption) == ("image", "a ramp")
    frame = only_frame(source)
    assert frame.shape == (40, 60, 3) and frame[:, :5].mean() < 20 and frame[:, -5:].mean() > 235


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "a.jpg").write_bytes(picture(form="JPEG", exif=exif))
    (tmp_path / "a.txt").write_text("a ramp")
    frame = only_frame(scan_sources(tmp_path)[0])
    assert frame.shape == (60, 40, 3) and frame[:5].mean() < 20 and frame[-5:].mean() > 235


def test_what_is_transparent_is_white_and_sixteen_bits_are_eight(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    clear, deep = (only_frame(source) for source in scan_sources(tmp_path))
    assert (clear == 255).all() and (deep == 128).all()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(form="JPEG")[:300])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.jpg: can't be decoded"):
        only_frame(scan_sources(tmp_path)[0])


def test_an_image_needs_a_bucket_of_one_frame(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.mp4")
    (tmp_path / "a.txt").write_text("a")
    image, video = scan_sources(tmp_path)
    assert "no bucket has one frame; add [1, height, width] to clip.buckets" in str(image_problem(image, [Thw(16, 64, 64)]))
    assert image_problem(image, [Thw(16, 64, 64), Thw(1, 64, 64)]) is image_problem(video, [Thw(16, 64, 64)]) is None


def test_members_of_tars_are_sources_with_the_captions_of_their_keys(tmp_path: Path) -> None:
    pack(
        tmp_path / "sub" / "x.tar",
        {
            "d/1.mp4": b"video",
            "d/1.txt": b" gr\xc3\xb6\xc3\x9fer\n",
            "2.jpg": b"image",
            "2.json": json.dumps({"caption": "two", "text": "no"}).encode(),
            "3.mp4": b"v",
            "3.json": json.dumps({"text": "three"}).encode(),
            "4.mp4": b"no caption",
            "4.json": b"[1]",
            "5.txt": b"no video",
            "6.jpg": b"of a video",
            "6.mp4": b"the video",
            "README": b"",
        },
    )
    (tmp_path / "b.mp4").write_bytes(b"beside")
    sources = scan_sources(tmp_path)
    assert captions(sources) == {
        "b.mp4": None,
        "sub/x.tar/2.jpg": "two",
        "sub/x.tar/3.mp4": "three",
        "sub/x.tar/4.mp4": None,
        "sub/x.tar/6.mp4": None,
        "sub/x.tar/d/1.mp4": "größer",
    }
    assert [source.kind for source in sources] == ["video", "image", "video", "video", "video", "video"]
    held = {source.name: source.open().read() for source in sources[1:]}  # type: ignore[union-attr]
    assert (
        held["sub/x.tar/d/1.mp4"] == b"video" and held["sub/x.tar/2.jpg"] == b"image" and held["sub/x.tar/6.mp4"] == b"the video"
    )


def test_a_video_in_a_tar_is_decoded_where_it_lies(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    pack(tmp_path / "x.tar", {"n.txt": b"n", "n.mp4": (tmp_path / "a.mp4").read_bytes(), "m.png": picture(), "m.txt": b"m"})
    sources = {source.name: source for source in scan_sources(tmp_path)}
    whole, _ = read_video(tmp_path / "a.mp4")
    assert np.array_equal(np.stack([frame for _, frame in iter_frames(sources["x.tar/n.mp4"].open())]), whole)
    assert only_frame(sources["x.tar/m.png"]).shape == (40, 60, 3)


def test_a_video_that_is_cut_off_in_a_tar_names_tar_and_member(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    pack(tmp_path / "y" / "x.tar", {"n.mp4": (tmp_path / "a.mp4").read_bytes()[:900], "n.txt": b"n"})
    (source,) = scan_sources(tmp_path / "y")
    with pytest.raises(DataError, match=r"y/x\.tar/n\.mp4: can't be decoded"):
        list(iter_frames(source.open()))
    assert source.label.endswith("y/x.tar/n.mp4")


def test_a_tar_that_cannot_be_used_gives_what_comes_before_and_stops_no_other(tmp_path: Path) -> None:
    whole = {"a.mp4": b"v" * 900, "a.txt": b"a", "b.mp4": b"v", "b.txt": b"b"}
    pack(tmp_path / "link.tar", whole, link="c.mp4")
    pack(tmp_path / "short.tar", whole)
    with open(tmp_path / "short.tar", "r+b") as file:
        file.truncate(5 * 512 + 512 + 10)  # b.mp4 is whole, b.txt isn't there
    (tmp_path / "empty.tar").touch()
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    with tarfile.open(tmp_path / "name.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.mp4"))
    touch(tmp_path, "fine.mp4")
    said = problems(scan_sources(tmp_path))
    for name in ("fine.mp4", "link.tar/a.mp4", "short.tar/a.mp4"):
        assert said.pop(name) is None
    expected = {
        "empty.tar": "cut short",
        "gone.tar": "No such file",
        "link.tar": "symbolic link",
        "name.tar": "UTF-8",
        "short.tar": "cut short",
    }
    assert list(said) == list(expected)
    for name, part in expected.items():
        assert part in str(said[name]) and "take it out of input.path" in str(said[name])


def test_a_caption_in_a_tar_must_be_utf8_and_stops_no_other(tmp_path: Path) -> None:
    pack(
        tmp_path / "x.tar", {"a.mp4": b"v", "a.txt": b"gr\xf6\xdfer", "b.mp4": b"v", "b.json": b"{", "c.mp4": b"v", "c.txt": b"c"}
    )
    said = problems(scan_sources(tmp_path))
    assert "its .txt is not UTF-8 txt: a.txt" in str(said["x.tar/a.mp4"]) and "its .json is not" in str(said["x.tar/b.mp4"])
    assert said["x.tar/c.mp4"] is None


def test_half_a_surrogate_pair_in_a_caption_becomes_a_question_mark(tmp_path: Path) -> None:
    said = rb'{"caption": "a \ud83d cat"}', rb'{"text": "a \ud83d\ude00 cat"}'
    pack(tmp_path / "x.tar", {"a.mp4": b"v", "a.json": said[0], "b.mp4": b"v", "b.json": said[1]})
    assert list(captions(scan_sources(tmp_path)).values()) == ["a ? cat", "a \U0001f600 cat"]
