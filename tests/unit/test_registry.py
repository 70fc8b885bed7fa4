from __future__ import annotations

import pytest

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.registry import Registry, nearest


def test_an_unknown_name_is_refused_with_field_names_and_the_nearest():
    registry = Registry("objective.name")
    registry.register("rectified_flow")(1)
    registry.register("iddpm")(2)
    assert registry.get("iddpm") == 2
    assert registry.names() == ["iddpm", "rectified_flow"]
    with pytest.raises(
        ConfigError, match=r"objective\.name='rectifed_flow'.*iddpm, rectified_flow.*did you mean 'rectified_flow'"
    ):
        registry.get("rectifed_flow")


def test_a_second_entry_of_a_name_is_our_mistake():
    registry = Registry("x")
    registry.register("a")(1)
    with pytest.raises(AssertionError, match="x=a is registered twice"):
        registry.register("a")(2)


@pytest.mark.parametrize("name, said", [("widht", "; did you mean 'width'?"), ("zzz", ""), ("depht", "; did you mean 'depth'?")])
def test_nearest_says_a_close_name_or_nothing(name, said):
    assert nearest(name, ["width", "depth"]) == said
