"""What may not be trained on: word lists, nudenet on real frames, and how another detector is added."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from real_clips import real_clips

from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig, SafetyConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.video import read_video
from opensora_dist.prepare.safety import IMAGE_DETECTORS, ImageSafety, TextSafety

CPU = torch.device("cpu")
WORDS = """# a list

gore
Blood Bath
crème
бой
坏词
ブス
"""


@pytest.fixture
def text_safety(tmp_path):
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    return TextSafety(SafetyConfig(words=str(tmp_path / "words.txt")))


@pytest.mark.parametrize(
    "caption, line",
    [
        ("a scene of gore.", 3),
        ("GORE!", 3),
        ("ｇｏｒｅ on a wall", 3),
        ("a göre of it", 3),
        ("a blood-bath in red", 4),
        ("blood\n  BATH", 4),
        ("some creme", 5),
        ("some CRE\u0300ME", 5),
        ("Бой идёт", 6),
        ("一个坏词在这里", 7),
        ("crème and gore", 5),  # the first in the caption
        ("a go\u200bre", 3),  # a space without width
        ("a go\u00adre", 3),  # a soft hyphen
        ("a go&#114;e", 3),
        ("a go&amp;#114;e", 3),
        ("a go\u0307\u20ddre", 3),  # a dot above, a circle around
        ("a go\ufe0f\u034f\u2060re", 3),
        ("a go\x07re", 3),
        ("gore\u200bman", 3),  # where it parts words
        ("gore\u3164man", 3),  # a blank letter
        ("a ブス is here", 8),
        ("a ﾌﾞｽ is here", 8),
    ],
)
def test_whole_words_and_phrases_are_found_in_any_case_and_with_any_accents(text_safety, caption, line):
    assert text_safety.refuses(caption) == f"safety.words: its caption holds what line {line} lists"


@pytest.mark.parametrize(
    "caption", ["", "a gorey tale", "Gorecki plays", "a bath of blood", "blood in a bath", "a list", "词坏", "#", "フス"]
)
def test_parts_of_words_and_words_in_another_order_are_not(text_safety, caption):
    assert text_safety.refuses(caption) is None


def test_a_reason_never_holds_the_word(text_safety):
    assert "gore" not in text_safety.refuses("gore").lower()


def test_without_a_list_nothing_is_refused():
    assert TextSafety(SafetyConfig()).refuses("gore") is None


@pytest.mark.parametrize(
    "content, said", [(None, "can't be read"), (b"# only a remark\n\n", "lists no word"), (b"caf\xe9\n", "line 1 holds bytes")]
)
def test_a_list_that_cannot_be_used_is_a_config_error(tmp_path, content, said):
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        TextSafety(SafetyConfig(words=str(tmp_path / "words.txt")))


# --- pictures


class Stub:
    """Finds what it was told to, and notes how many frames it saw."""

    def __init__(self, found):
        self.found, self.seen = found, []

    def detect(self, frames):
        self.seen.append(len(frames))
        return self.found


@pytest.fixture
def registered(monkeypatch):
    """How a detector is added: an entry under a name, which ``safety.images`` of the schema lists too."""

    def add(found):
        stub = Stub(found)
        monkeypatch.setitem(IMAGE_DETECTORS._entries, "stub", lambda config, device: stub)
        return stub

    return add


def safety(**options):
    return ImageSafety(SafetyConfig().model_copy(update={"images": "stub", **options}), device=CPU)


def frames(count=16):
    return np.zeros((count, 8, 8, 3), np.uint8)


def test_what_a_detector_finds_refuses_with_class_and_confidence(registered):
    registered([("FACE_MALE", 0.99), ("BUTTOCKS_EXPOSED", 0.61), ("ANUS_EXPOSED", 0.55)])
    assert safety().refuses(frames()) == "safety.images=stub, BUTTOCKS_EXPOSED: confidence 0.61"
    assert safety(image_threshold=0.61).refuses(frames()) is not None
    assert safety(image_threshold=0.62).refuses(frames()) is None
    assert safety(image_classes=("FACE_FEMALE",)).refuses(frames()) is None
    assert safety(image_classes=("FACE_MALE",)).refuses(frames()) == "safety.images=stub, FACE_MALE: confidence 0.99"


def test_a_detector_that_finds_nothing_refuses_nothing(registered):
    registered([])
    assert safety().refuses(frames()) is None


def test_a_detector_sees_as_many_frames_as_the_config_says(registered):
    stub = registered([])
    for count in (16, 3, 1):
        safety(image_frames=4).refuses(frames(count))
    assert stub.seen == [4, 3, 1]


def test_none_looks_at_nothing_and_an_unknown_one_is_a_config_error():
    assert ImageSafety(SafetyConfig(), device=CPU).refuses(frames()) is None
    with pytest.raises(ConfigError, match=r"safety\.images='nudnet' is not known; use one of: nudenet; did you mean 'nudenet'"):
        safety(images="nudnet")


def test_a_class_that_the_detector_does_not_know_is_refused_with_the_config():
    with pytest.raises(ConfigError, match=r"safety\.image_classes"):
        load_config(PrepareConfig, None, overrides=["safety.image_classes=[BUTTOCK]"])


def test_without_nudenet_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ConfigError, match=r"pip install 'opensora-dist\[safety\]'"):
        ImageSafety(SafetyConfig(images="nudenet"), device=CPU)


@pytest.fixture(scope="module")
def footage():
    pytest.importorskip("nudenet")
    folder = real_clips()
    return {name: read_video(folder / f"{name}.mp4")[0] for name in ("bigbuckbunny", "bikes", "carphone_pristine")}


def nudenet(**options):
    return ImageSafety(SafetyConfig(images="nudenet", **options), device=CPU)


def test_nudenet_lets_real_footage_pass_and_runs_on_one_thread(footage):
    made = nudenet()
    assert made.refuses(footage["bikes"]) is None
    assert made.refuses(footage["carphone_pristine"]) is None
    options = made._detector._detector.onnx_session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_nudenet_finds_the_face_that_is_there_where_faces_count(footage):
    said = nudenet(image_classes=("FACE_FEMALE", "FACE_MALE"), image_frames=2).refuses(footage["carphone_pristine"])
    assert said.startswith("safety.images=nudenet, FACE_")


def test_nudenet_takes_a_drawn_rabbit_for_something_else_unless_the_threshold_is_raised(footage):
    """What docs/captions.md warns of: the detector was made for photographs of people."""
    assert nudenet().refuses(footage["bigbuckbunny"]) is not None
    assert nudenet(image_threshold=0.9).refuses(footage["bigbuckbunny"]) is None


def test_nudenet_takes_one_image(footage):
    assert nudenet().refuses(footage["bikes"][:1]) is None
