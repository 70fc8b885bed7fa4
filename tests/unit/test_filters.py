"""Which clips are dropped, and what is said about it."""

from __future__ import annotations

import pytest

from opensora_dist.config.prepare import FilterConfig
from opensora_dist.prepare.filters import dropped_by

SCORES = {
    "duration_s": 2.0,
    "min_side": 480,
    "brightness": 90.0,
    "static": 0.25,
    "sharpness": 120.0,
    "motion": 1.5,
    "text_area": 0.02,
    "compression": 0.08,
    "camera": "pan left",
    "duplicates": 0x0123456789ABCDEF,
    "aesthetic": 5.1,
    "match": 0.28,
}


@pytest.mark.parametrize(
    "field, passes, drops, says",
    [
        ("min_s", 2.0, 2.5, "duration_s=2 is below filter.min_s=2.5"),
        ("min_side", 480, 512, "min_side=480 is below filter.min_side=512"),
        ("brightness", (10, 245), (100, None), "brightness=90 is below filter.brightness[0]=100"),
        ("brightness", (None, 90), (None, 80), "brightness=90 is above filter.brightness[1]=80"),
        ("static", 0.25, 0.2, "static=0.25 is above filter.static=0.2"),
        ("sharpness", 120, 150, "sharpness=120 is below filter.sharpness=150"),
        ("motion", (0.5, 60), (2, 60), "motion=1.5 is below filter.motion[0]=2"),
        ("motion", (1.5, 1.5), (0.5, 1), "motion=1.5 is above filter.motion[1]=1"),
        ("text_area", 0.02, 0.01, "text_area=0.02 is above filter.text_area=0.01"),
        ("compression", 0.08, 0.1, "compression=0.08 is below filter.compression=0.1"),
        ("camera", ("pan left",), ("static", "zoom in"), "camera='pan left' is not in filter.camera=['static', 'zoom in']"),
        ("aesthetic", 5, 5.5, "aesthetic=5.1 is below filter.aesthetic=5.5"),
        ("match", 0.2, 0.3, "match=0.28 is below filter.match=0.3"),
    ],
)
def test_a_threshold_is_met_or_named(field, passes, drops, says):
    assert dropped_by(SCORES, FilterConfig(**{field: passes})) is None
    assert dropped_by(SCORES, FilterConfig(**{field: drops})) == says
    assert dropped_by({}, FilterConfig(**{field: drops})) is None, "what isn't measured is no reason"
    assert dropped_by(dict.fromkeys(SCORES), FilterConfig(**{field: drops})) is None, "nor what such a clip doesn't have"


def test_every_field_of_the_filter_is_judged():
    strict = {"min_s": 9, "min_side": 999, "brightness": (99, None), "static": 0, "sharpness": 999, "motion": (9, None)}
    strict |= {"text_area": 0, "compression": 9, "camera": (), "aesthetic": 9, "match": 1}
    unjudged = {field for field in FilterConfig.model_fields if field not in strict}
    assert unjudged == {"duplicates"}, "a matter of the whole set"
    for field, threshold in strict.items():
        assert dropped_by(SCORES, FilterConfig(**{field: threshold})) is not None, field


def test_a_camera_motion_that_no_camera_makes_is_refused():
    with pytest.raises(ValueError, match="pan left"):
        FilterConfig(camera=("pan_left",))


def test_the_first_reason_in_the_order_of_the_filter_is_given():
    reason = dropped_by(SCORES, FilterConfig(match=0.9, min_s=3, motion=(5, None)))
    assert reason == "duration_s=2 is below filter.min_s=3"
