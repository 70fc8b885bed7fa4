from __future__ import annotations

import numpy as np
import pytest
import torch

from opensora_dist.codecs.dct import DctCodec, coefficient_order
from opensora_dist.codecs.registry import build_codec
from opensora_dist.config.codec import DctCodecConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw

CPU = torch.device("cpu")


def codec(*, channels: int = 16, temporal_factor: int = 1) -> DctCodec:
    return DctCodec(channels=channels, temporal_factor=temporal_factor, device=CPU)


def noise_clip(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


@pytest.mark.parametrize("temporal_factor", [1, 4])
def test_every_coefficient_kept_gives_the_pixels_back_exactly(temporal_factor: int) -> None:
    clip = noise_clip(2, 8, 16, 24, 3)
    whole = codec(channels=192 * temporal_factor, temporal_factor=temporal_factor)
    assert torch.equal(whole.decode(whole.encode(clip)), clip)


@pytest.mark.parametrize("temporal_factor", [1, 4])
def test_fewer_channels_are_a_prefix_of_more(temporal_factor: int) -> None:
    clip = noise_clip(1, 4, 16, 16, 3)
    few, many = (codec(channels=c, temporal_factor=temporal_factor).encode(clip) for c in (16, 48))
    torch.testing.assert_close(few, many[:, :16])


def test_basis_is_orthonormal_per_colour() -> None:
    ours = codec(channels=192)
    luma = [i for i, (c, *_) in enumerate(coefficient_order(1)) if c == 0]
    # A unit luma coefficient decodes to the same value in R, G and B, with unit energy in each.
    rows = ours._synthesis_CP[luma].reshape(64, 64, 3)
    for channel in range(3):
        torch.testing.assert_close(rows[..., channel] @ rows[..., channel].T, torch.eye(64), atol=1e-5, rtol=0)


def test_grey_clip_has_one_coefficient_eight_times_its_value() -> None:
    latents = codec().encode(torch.full((1, 1, 8, 8, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(latents.flatten(), torch.tensor([8.0] + [0.0] * 15), atol=1e-5, rtol=0)


def test_blocks_are_where_they_are_in_the_picture() -> None:
    clip = torch.zeros(1, 2, 16, 24, 3, dtype=torch.uint8)
    clip[:, 1, 8:, 16:] = 255
    luma = codec().encode(clip)[0, 0]
    assert (luma > 0).nonzero().tolist() == [[1, 1, 2]]


def test_sixteen_channels_are_ten_luma_and_three_of_each_chroma() -> None:
    kept = coefficient_order(1)[:16]
    assert [sum(c == colour for c, *_ in kept) for colour in range(3)] == [10, 3, 3]
    assert [c for c, *_ in kept[:3]] == [0, 1, 2]
    assert all(u + v <= 3 for _, _, u, v in kept)


@pytest.mark.parametrize("temporal_factor", [1, 4])
def test_order_lists_every_coefficient_once(temporal_factor: int) -> None:
    assert len(set(coefficient_order(temporal_factor))) == 192 * temporal_factor


def test_smooth_picture_survives_sixteen_channels() -> None:
    y, x = np.mgrid[0:64, 0:64] / 64
    picture = np.stack([255 * x, 255 * y, 127.5 * (1 + np.sin(4 * (x + y)))], axis=-1).round().astype(np.uint8)
    clip = torch.from_numpy(picture)[None, None]
    assert psnr(codec().decode(codec().encode(clip)), clip) > 40


def test_decode_clamps_and_rounds() -> None:
    latents = torch.zeros(1, 16, 1, 1, 1)
    latents[0, 0] = 100.0
    assert codec().decode(latents).unique().tolist() == [255]
    assert codec().decode(-latents).unique().tolist() == [0]
    assert codec().decode(torch.zeros_like(latents)).unique().tolist() == [128]


def test_stats_are_left_to_be_measured() -> None:
    assert codec().stats is None


@pytest.mark.parametrize("clip", [Thw(15, 64, 64), Thw(16, 60, 64), Thw(16, 64, 65), Thw(0, 64, 64)])
def test_a_shape_that_does_not_fit_names_shapes_that_do(clip: Thw) -> None:
    ours = codec(temporal_factor=4)
    with pytest.raises(ConfigError, match=r"codec\.temporal_factor=4.*use \d+x") as error:
        ours.latent_shape(clip)
    named = [Thw(*map(int, word.split("x"))) for word in str(error.value).rsplit("use ", 1)[1].split(" or ")]
    for shape in named:
        assert min(ours.latent_shape(shape)) > 0


def test_too_many_channels_for_one_frame_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"codec\.channels=300"):
        build_codec(DctCodecConfig(channels=300, temporal_factor=1), device=CPU)


def test_encode_agrees_with_latent_shape() -> None:
    ours = codec(channels=5, temporal_factor=4)
    assert ours.encode(noise_clip(3, 8, 24, 40, 3)).shape == (3, 5, *ours.latent_shape(Thw(8, 24, 40)))
