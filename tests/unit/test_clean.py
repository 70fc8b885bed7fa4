"""What is taken out of captions, and what is put behind them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_dist.config.prepare import CleanConfig
from opensora_dist.prepare.clean import append_scores, clean_caption

ON = CleanConfig(enabled=True)


@pytest.mark.parametrize(
    "dirty, clean",
    [
        # markup, entities, links
        ("<b>A red</b>&nbsp;circle &amp; a <a href='x'>square</a>.<br/>", "A red circle & a square."),
        ("&lt;p&gt;A circle&lt;/p&gt;", "A circle"),
        ("&amp;lt;p&amp;gt;A circle", "A circle"),
        ("A cat [on a mat](http://example.org/a_b) sleeps", "A cat on a mat sleeps"),
        ("**A cat** sleeps on a __mat__.", "A cat sleeps on a mat."),
        ("# A cat\n- It sleeps", "A cat It sleeps"),
        ("A cat.<|im_end|>", "A cat."),
        # addresses, names, tags, pictographs
        ("A cat, see https://example.org/x?y=1#z. It sleeps.", "A cat, see. It sleeps."),
        ("A cat (www.example.org) sleeps", "A cat sleeps"),
        ("Mail me@example.org about the cat", "Mail about the cat"),
        ("A cat by @someone #catsofinstagram #1 on the wall", "A cat by #1 on the wall"),
        ("A cat 😀👩‍👩‍👧🏽 and a dog ❤️ 🇫🇷", "A cat and a dog"),
        # unicode and spaces
        ("Cafe\u0301 au lait", "Café au lait"),
        ("  A \t cat\u00a0\n\u2028 sleeps\u200b\ufeff ", "A cat sleeps"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        # openings
        ("The video shows a red circle.", "A red circle."),
        ("This image depicts a cat.", "A cat."),
        ("In this video, we can see a cat.", "A cat."),
        ("In the image there is a cat.", "A cat."),
        ("The video clip begins with the camera on a cat.", "The camera on a cat."),
        ("Sure! Here is a detailed description of the video: The video features a cat.", "A cat."),
        ("Caption: the short video seems to show a cat.", "A cat."),
        # repetition
        ("A a red red circle", "A red circle"),
        ("The man walks the man walks, the man walks.", "The man walks."),
        ("A cat sleeps. It is grey. A cat sleeps. It is grey.", "A cat sleeps. It is grey."),
        # what a limit on tokens cut off
        ("A cat sleeps on a mat. The mat is of a", "A cat sleeps on a mat."),
        ('A sign says "Stop!" The car in front of', 'A sign says "Stop!"'),
        ("一只猫。它在睡", "一只猫。"),
    ],
)
def test_what_is_not_about_the_picture_goes(dirty, clean):
    assert clean_caption(dirty, ON) == clean


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moves left",
        "A man talks to Mr. Smith about J. Doe",
        "A 3.5 m boat, e.g. a dinghy, at 12:30",
        "x < 3 and y > 2, 50% of #1 @ 5 o'clock",
        "In the videotape shop a man waits",
        "An image shows another image",
        "The scene outside the window is calm.",
        "Rooms 10 10 and 11",
        "रोक का एक का कि",
        "Élan vital : l'été à Nîmes !",
        "一只猫在睡觉",
        "H₂O at −5 °C → ice, ½ of it",
        "",
    ],
)
def test_what_is_about_the_picture_stays(text):
    assert clean_caption(text, ON) == text


def test_nothing_is_touched_unless_asked_for():
    assert clean_caption("  <b>The video shows</b> 😀 ", CleanConfig()) == "  <b>The video shows</b> 😀 "


_PIECES = st.sampled_from(
    [
        *("The video shows ", "In this image, ", "Sure, ", "Caption: ", "a cat ", "a cat. ", "the the ", "Mr. ", "Ab. "),
        *("&amp;", "&lt;", "b&gt;", "<i>", "[a](b)", "**", "- ", "(", ")", "http://a.b ", "@x", "#y", "\n", ".", ",", "!", "。"),
        *("e\u0301", "\u0958", "😀", "\u200d"),
    ]
)


@given(st.one_of(st.text(), st.lists(_PIECES).map("".join), st.lists(st.one_of(_PIECES, st.text(max_size=3))).map("".join)))
def test_cleaning_what_is_clean_changes_nothing(text):
    once = clean_caption(text, ON)
    assert clean_caption(once, ON) == once
    assert once == unicodedata.normalize("NFC", " ".join(once.split()))


@pytest.mark.timeout(30)
def test_a_caption_of_a_hundred_thousand_characters_is_cleaned_at_once():
    for piece in ("a", "a ", "a@", "[", "<a", "&lt;", "the cat, ", ".", "https://", "\u200d😀"):
        clean_caption(piece * (100_000 // len(piece)), ON)


# --- scores


def test_scores_are_appended_in_the_published_form():
    scores = {"camera": "pan left", "motion": 10.0, "aesthetic": 5.5, "sharpness": 3.0}
    assert append_scores("A cat.", scores, ("aesthetic", "motion", "camera")) == (
        "A cat. aesthetic score: 5.5, motion score: 10, camera motion: pan left."
    )
    assert append_scores("A cat.", scores, ("camera", "motion")) == "A cat. motion score: 10, camera motion: pan left."
    assert append_scores("A cat.", scores, ()) == "A cat."
    assert append_scores("", scores, ("motion",)) == "motion score: 10."


@pytest.mark.parametrize(
    "value, said",
    [(10.04, "10"), (5.46, "5.5"), (0.25, "0.2"), (0.35, "0.3"), (-0.01, "0"), (-1.26, "-1.3"), (1234567.0, "1234567")],
)
def test_numbers_have_at_most_one_decimal_rounded_from_their_exact_value(value, said):
    assert append_scores("x", {"motion": value}, ("motion",)) == f"x motion score: {said}."


def test_a_score_that_the_clip_lacks_or_the_caption_names_is_left_out():
    assert append_scores("A cat.", {"aesthetic": 5.0}, ("aesthetic", "motion", "camera")) == "A cat. aesthetic score: 5."
    assert append_scores("A cat.", {"motion": float("nan")}, ("motion",)) == "A cat."
    assert append_scores("A cat.", {}, ("motion",)) == "A cat."
    once = append_scores("A cat.", {"motion": 2.0}, ("motion",))
    assert append_scores(once, {"motion": 3.0}, ("motion",)) == once


def test_appended_scores_survive_cleaning():
    once = append_scores("A cat sleeps.", {"motion": 10.0, "camera": "static"}, ("motion", "camera"))
    assert clean_caption(once, ON) == once
