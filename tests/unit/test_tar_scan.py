"""Members of real tars, as WebDataset names them."""

from __future__ import annotations

from opensora_dist.core.tar import split_name


def test_a_key_ends_at_the_first_dot_of_the_last_part() -> None:
    assert split_name("d.x/a0.latents.npy") == ("d.x/a0", "latents.npy")
    assert split_name("a.txt") == ("a", "txt")
    assert split_name("noext") is split_name(".hidden") is split_name("d/.hidden.txt") is None
