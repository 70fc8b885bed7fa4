"""The table of the mesh says of every rank what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_dist.config.train import SpConfig
from opensora_dist.parallel.mesh import places_of
from opensora_dist.parallel.places import Places

WHOLE = Places(dp_replicate=2, dp_shard=1, ring=2, ulysses=2, tp=2)


def _rows(text):
    """The lines of the ranks, cell by cell."""
    lines = [line for line in text.splitlines() if line[:1].isdigit()]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_every_rank_has_its_line_and_ranks_of_tp_are_next_to_each_other():
    rows = _rows(WHOLE.table())
    assert [row[0] for row in rows] == [str(rank) for rank in range(16)]
    assert rows[0][1:] == ["0 of 2", "0 of 4 (ring 0, ulysses 0)", "0 of 2", "0 of 4", "0 of 2"]
    assert rows[1][1:] == ["0 of 2", "0 of 4 (ring 0, ulysses 0)", "1 of 2", "0 of 4", "0 of 2"]
    assert rows[13][1:] == ["1 of 2", "2 of 4 (ring 1, ulysses 0)", "1 of 2", "2 of 4", "1 of 2"]


def test_no_two_ranks_hold_the_same():
    places = Places(dp_replicate=1, dp_shard=2, ring=2, ulysses=2, tp=2)
    rows = [tuple(row[1:]) for row in _rows(places.table())]
    assert len(set(rows)) == places.world == len(rows)


def test_a_shard_of_parameters_is_held_by_as_many_ranks_as_there_are_copies():
    shards = [tuple(row[3:5]) for row in _rows(WHOLE.table())]
    assert all(shards.count(shard) == WHOLE.dp_replicate for shard in shards)


@pytest.mark.parametrize("dp_shard", [8, 64])
def test_a_large_world_is_summed_up(dp_shard):
    places = Places(dp_replicate=1, dp_shard=dp_shard, ring=1, ulysses=4, tp=2)
    text = places.table()
    ranks = [int(row[0]) for row in _rows(text)]
    assert len(text.splitlines()) < 30
    assert ranks == [*range(12), *range(places.world - 4, places.world)]
    assert f"... {places.world - 16} more ranks" in text
    assert f"dp_shard      {dp_shard:<4}  +8" in text


def test_axes_divide_the_world_as_the_config_says():
    places = places_of(world=64, dp_replicate=2, sp=SpConfig(degree=4, scheme="usp", ulysses=2), tp=2)
    assert places == Places(dp_replicate=2, dp_shard=4, ring=2, ulysses=2, tp=2)
    assert places.world == 64 and places.shards == 16
    assert str(places) == "dp_replicate 2 x dp_shard 4 x ring 2 x ulysses 2 x tp 2"
    assert str(places_of(world=1, dp_replicate=1, sp=SpConfig(), tp=1)) == "dp_shard 1"


def test_the_documented_table_is_the_one_that_is_printed():
    places = places_of(world=4, dp_replicate=1, sp=SpConfig(degree=2), tp=2)
    assert places.table() in (Path(__file__).parents[2] / "docs/mesh.md").read_text()
