from __future__ import annotations

import math

import torch

from opensora_dist.models.positions import Positions, sincos_1d, sincos_2d


def test_one_dimension_is_sines_then_cosines_of_index_over_scale():
    table = sincos_1d(3, width=4, scale=0.5)
    expected = [[math.sin(2 * i), math.sin(0.02 * i), math.cos(2 * i), math.cos(0.02 * i)] for i in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)


def test_two_dimensions_are_column_then_row_in_raster_order():
    table = sincos_2d(2, 3, width=8, scale=2.0)
    assert table.shape == (6, 8)

    def half(i: float) -> list[float]:
        return [math.sin(i), math.sin(0.01 * i), math.cos(i), math.cos(0.01 * i)]

    expected = [half(column / 2) + half(row / 2) for row in range(2) for column in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)


def test_a_time_scale_of_two_thirds_puts_frames_one_and_a_half_apart():
    torch.testing.assert_close(sincos_1d(5, width=8, scale=2 / 3)[2], sincos_1d(4, width=8, scale=1.0)[3])


def test_a_longer_grid_starts_with_the_shorter_one():
    assert torch.equal(sincos_1d(9, width=8, scale=1.0)[:4], sincos_1d(4, width=8, scale=1.0))


def test_tables_are_made_once_per_grid_and_dtype():
    positions = Positions(width=8, space_scale=1.0, time_scale=0.5)
    cpu = torch.device("cpu")
    first = positions.space(2, 3, device=cpu, dtype=torch.float32)
    assert positions.space(2, 3, device=cpu, dtype=torch.float32) is first
    assert not torch.equal(positions.space(3, 2, device=cpu, dtype=torch.float32), first)
    assert positions.space(2, 3, device=cpu, dtype=torch.float64).dtype == torch.float64
    assert positions.time(6, device=torch.device("meta"), dtype=torch.float32).is_meta
    torch.testing.assert_close(positions.time(6, device=cpu, dtype=torch.float64), sincos_1d(6, width=8, scale=0.5))
