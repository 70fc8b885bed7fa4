"""The page about a data set: whole by itself, safe from what a caption or a file's name holds, and loud about what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opensora_dist.observe.bars import Bar, bar_list, histogram
from opensora_dist.observe.data_stats import BucketStats, BucketTraining, DataStats, Distribution, DropReason, TrainingStats
from opensora_dist.observe.stats_page import Picture, write_stats_page

NASTY = "<script>alert('x')</script> & \"quotes\""
PICTURE = Picture(jpeg=b"\xff\xd8jpeg", title=NASTY, note=NASTY)
TRAINING = TrainingStats(
    config=NASTY,
    batch="4 samples of one shape a step",
    steps_per_epoch=2,
    buckets=(
        BucketTraining(bucket="4x16x16", samples=9, used=8, steps=2, reason="tail of each epoch"),
        BucketTraining(bucket="1x16x16", samples=1, used=0, steps=0, reason="fewer than a global batch"),
    ),
    left_out={"1x16x16: fewer than a global batch": 1},
    efficiency=0.957,
    imbalance=0.021,
)
STATS = DataStats(
    path=f"/data/{NASTY}",
    dataset_hash="ab",
    samples=10,
    shards=3,
    num_bytes=51_200,
    duration_s=4.5,
    spec={"codec": {"name": NASTY}},
    buckets=(BucketStats(bucket="4x16x16", samples=9, seconds=0.5, latent="4x2x2", text_tokens=3.5, model_tokens=4),),
    distributions=(Distribution.of("Text tokens", [1, 2, 2, 5]),),
    empty_captions=1,
    looked_at=14,
    drops=(DropReason(stage="filter", reason=NASTY, count=4, examples=(NASTY, "b.mp4")),),
    scores=(Distribution.of("Motion", [0.5, 1.5], [0.1], unit="pixels", unknown=2),),
    classes={"Camera motion": {NASTY: 3, "static": 2}},
    training=TRAINING,
)


class Page(HTMLParser):
    """Tags and their nesting, what they would load, and the text."""

    VOID = frozenset({"meta", "img", "path", "rect", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(tmp_path: Path, stats: DataStats = STATS, **pictures: object) -> Page:
    return Page(write_stats_page(tmp_path / "page.html", stats, **pictures).read_text(encoding="utf-8"))  # type: ignore[arg-type]


def test_the_page_is_well_formed_loads_nothing_and_runs_no_text(tmp_path: Path) -> None:
    page = page_of(tmp_path, kept=[PICTURE, PICTURE], dropped={NASTY: [PICTURE]})
    assert len(page.loads) == 3 and all(load.startswith("data:image/jpeg;base64,") for load in page.loads)
    assert page.scripts == 1 and NASTY in page.text


def test_it_says_what_is_in_the_set_and_what_became_of_it(tmp_path: Path) -> None:
    text = page_of(tmp_path).text
    for said in (
        "14",
        "71.4% kept",
        "4x16x16",
        "95.7%",
        "2.1%",
        "tail of each epoch",
        "Motion",
        "static",
        "1 samples have an empty",
    ):
        assert said in text, said


def test_a_bucket_without_a_batch_is_a_warning_at_the_top(tmp_path: Path) -> None:
    raw = write_stats_page(tmp_path / "page.html", STATS).read_text()
    assert '<p class="warn">No batch comes from 1x16x16: see Training.</p>' in raw
    assert raw.index("No batch comes") < raw.index("<h2>")


def test_a_config_that_can_not_train_says_why_at_the_top(tmp_path: Path) -> None:
    training = replace(TRAINING, problem="every bucket is smaller", steps_per_epoch=0)
    raw = write_stats_page(tmp_path / "page.html", replace(STATS, training=training)).read_text()
    assert raw.index("train on this: every bucket is smaller") < raw.index("<h2>")


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = page_of(tmp_path, replace(STATS, training=None, looked_at=None, drops=(), scores=(), classes={})).text
    assert "No training config was given" in text and "left no record here" in text


def test_bars_are_as_long_as_their_counts() -> None:
    html = bar_list([Bar(label="a", value=30), Bar(label="b", value=15, bad=True)])
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "50.00"]
    assert "66.7%" in html and "33.3%" in html


def test_a_histogram_stacks_what_was_dropped_on_what_was_kept() -> None:
    html = histogram("x", edges=[0, 1, 2], kept=[3, 0], dropped=[1, 2])
    boxes = re.findall(r'<rect class="([\w ]+)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', html)
    (kept, top, height), (lost, lost_top, lost_height), (other, _, other_height) = boxes
    assert (kept, lost, other) == ("column", "column bad", "column bad")
    assert float(lost_top) + float(lost_height) == pytest.approx(float(top), abs=0.11)
    assert float(height) == pytest.approx(3 * float(lost_height), abs=0.3)
    assert float(other_height) == pytest.approx(2 * float(lost_height), abs=0.3)


@pytest.mark.parametrize("kept", [[0, 0], [5, 0]])
def test_a_histogram_of_nothing_or_of_one_value_is_drawn(kept: list[int]) -> None:
    assert "<svg" in histogram("x", edges=[1, 1, 1], kept=kept)
