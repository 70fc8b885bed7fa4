"""Videos and images in WebDataset tars are prepared as if they lay in a folder."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opensora_dist.cli.main import main
from opensora_dist.core.video import write_video
from opensora_dist.data.index import Index
from opensora_dist.data.reader import ShardReader
from opensora_dist.prepare.sources import find_source, scan_sources
from opensora_dist.recipes.data_stats import data_stats, write_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three videos and an image, as files and in a tar; one of the videos is dark."""
    root = tmp_path_factory.mktemp("tars")
    (root / "files").mkdir()
    (root / "packed" / "sub").mkdir(parents=True)
    for i, level in enumerate((60, 100, 2)):
        ramp = np.linspace(0, 40, 24).astype(np.uint8)[None, None, :, None]
        write_video(root / "files" / f"v{i}.mp4", np.zeros((4, 16, 24, 3), np.uint8) + ramp + np.uint8(level), fps=8)
    Image.fromarray(np.full((20, 30, 3), 130, np.uint8)).save(root / "files" / "still.png")
    with tarfile.open(root / "packed" / "sub" / "a.tar", "w") as tar:
        for path in sorted((root / "files").iterdir()):
            path.with_suffix(".txt").write_text(f"about {path.stem}")
            for member in (path, path.with_suffix(".txt")):
                info = tarfile.TarInfo(f"part/{member.name}")
                info.size = member.stat().st_size
                tar.addfile(info, io.BytesIO(member.read_bytes()))
    return root


def prepare(folder: Path, out: Path, *more: str) -> int:
    buckets = "clip.buckets=[[4,16,24],[1,16,24]]"
    options = ["codec.channels=4", "text.width=8", "text.max_tokens=6", "filter.brightness=[40,null]", buckets, "clip.fps=8"]
    return main(["data", "prepare", f"input.path={folder}", f"output.path={out}", *options, *more])


def samples(out: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Last part of a source's name to caption and latents."""
    index = Index.open(out)
    read = ShardReader(index).read(range(len(index)))
    return {index.source(row).rsplit("/", 1)[-1]: (index.caption(row), sample.latents.copy()) for row, sample in enumerate(read)}


def test_members_of_a_tar_give_the_samples_that_files_give(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder / "files", tmp_path / "a") == prepare(folder / "packed", tmp_path / "b") == 0
    files, packed = samples(tmp_path / "a"), samples(tmp_path / "b")
    assert files.keys() == packed.keys() == {"v0.mp4", "v1.mp4", "still.png"}
    for name, (caption, latents) in files.items():
        assert packed[name][0] == caption == f"about {name.split('.')[0]}"
        assert np.array_equal(packed[name][1], latents)
    clips = pq.read_table(tmp_path / "b" / "clips.parquet").to_pylist()
    assert {row["path"] for row in clips if not row["kept"]} == {"sub/a.tar/part/v2.mp4"}


def test_an_image_is_dropped_with_the_way_out_where_no_bucket_has_one_frame(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder / "packed", tmp_path / "out", "clip.buckets=[[4,16,24]]") == 0
    clips = pq.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    (still,) = [row for row in clips if row["path"].endswith("still.png")]
    assert not still["kept"] and "add [1, height, width] to clip.buckets" in still["reason"]


def test_a_page_shows_what_was_left_out_of_a_tar(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder / "packed", tmp_path / "out") == 0
    page = write_page(tmp_path / "page.html", *data_stats(str(tmp_path / "out"))).read_text()
    assert page.count("data:image/jpeg") == 3 + 1 and "sub/a.tar/part/v2.mp4" in page


def test_a_source_is_found_by_its_name(folder: Path) -> None:
    for where in ("files", "packed"):
        for source in scan_sources(folder / where):
            found = find_source(folder / where, source.name)
            assert found is not None and (found.path, found.member, found.offset) == (source.path, source.member, source.offset)
    assert find_source(folder / "packed", "sub/a.tar/part/gone.mp4") is find_source(folder / "packed", "gone.tar/x.mp4") is None


def test_one_bad_input_stops_nothing_and_is_named_in_table_and_report(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "packed", tmp_path / "in")
    (tmp_path / "in" / "short.tar").write_bytes((folder / "packed" / "sub" / "a.tar").read_bytes()[:2000])
    shutil.copy(folder / "files" / "v0.mp4", tmp_path / "in" / "v.mp4")
    (tmp_path / "in" / "v.txt").write_bytes(b"caf\xe9")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert len(samples(tmp_path / "out")) == 3
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "out" / "clips.parquet").to_pylist()}
    assert "can't be used" in rows["short.tar"]["reason"] and "not UTF-8" in rows["v.mp4"]["reason"]
    assert rows["short.tar"]["stage"] == rows["v.mp4"]["stage"] == "probe"
    assert sum(json.loads((tmp_path / "out" / "report.json").read_text())["reasons"]["probe"].values()) == 2
