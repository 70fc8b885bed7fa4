"""The language of toy video: a scene, its caption, and which captions no training clip ever has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.registry import nearest
from opensora_dist.parallel.keys import Keys, sample_id

# Eight hues, at least 30 degrees apart in the CbCr plane, which is where a video codec keeps colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 40),
    "orange": (240, 120, 0),
    "yellow": (225, 225, 0),
    "green": (20, 180, 30),
    "cyan": (0, 200, 210),
    "blue": (40, 60, 230),
    "purple": (150, 40, 220),
    "pink": (240, 60, 170),
}
# Square root of the object's area over the frame's shorter side: equal sizes cover equal areas, whatever the shape.
SIZES: dict[str, float] = {"small": 0.20, "medium": 0.28, "large": 0.36}
SHAPES = ("circle", "square", "triangle", "cross")
# (x, y) per direction; y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_MOVES = 2

_HELD_OUT_ONE_IN = 10
_CAPTION = re.compile(r"a (\w+) (\w+) (\w+) moves (\w+)((?:, then \w+)*)")


@dataclass(frozen=True, kw_only=True)
class ToyScene:
    """What a toy clip shows.

    ``moves`` are the directions, in order; each takes an equal share of the clip, and no two in a row are equal.
    """

    size: str
    colour: str
    shape: str
    moves: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The one caption of this scene: ``a small red circle moves left, then up``."""
        return f"a {self.size} {self.colour} {self.shape} moves {', then '.join(self.moves)}"


def parse(caption: str) -> ToyScene:
    """The scene that a caption describes; the inverse of ``ToyScene.caption``.

    Raises:
        ConfigError: The caption is not of the toy language; the message names every word that is wrong.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        raise ConfigError(
            f"prompt {caption!r} is not of the toy language; write 'a SIZE COLOUR SHAPE moves DIRECTION' and at most once "
            "', then DIRECTION', e.g. 'a small red circle moves left, then up'"
        )
    size, colour, shape, first, rest = match.groups()
    moves = (first, *re.findall(r"then (\w+)", rest))
    problems = [
        f"prompt {caption!r}: {kind} {word!r} is not known; use one of {', '.join(known)}{nearest(word, known)}"
        for kind, word, known in (
            ("size", size, tuple(SIZES)),
            ("colour", colour, tuple(COLOURS)),
            ("shape", shape, SHAPES),
            *(("direction", move, tuple(DIRECTIONS)) for move in moves),
        )
        if word not in known
    ]
    if len(moves) > MAX_MOVES:
        problems.append(f"prompt {caption!r} has {len(moves)} movements; the toy language has at most {MAX_MOVES}")
    if any(a == b for a, b in pairwise(moves)):
        problems.append(f"prompt {caption!r} repeats a direction; say it once")
    if problems:
        raise ConfigError(problems)
    return ToyScene(size=size, colour=colour, shape=shape, moves=moves)


@cache
def all_scenes(num_moves: int) -> tuple[ToyScene, ...]:
    """Every scene with ``num_moves`` movements, in a fixed order."""
    paths = [p for p in product(DIRECTIONS, repeat=num_moves) if all(a != b for a, b in pairwise(p))]
    return tuple(
        ToyScene(size=size, colour=colour, shape=shape, moves=moves)
        for size, colour, shape, moves in product(SIZES, COLOURS, SHAPES, paths)
    )


def is_held_out(scene: ToyScene) -> bool:
    """Whether a scene is one of the tenth that no training clip shows.

    It depends on the caption alone, so a prompt is unseen by every model trained on toy video, whatever the seed of its data.
    """
    return sample_id(f"toy-held-out/{scene.caption}") % _HELD_OUT_ONE_IN == 0


@cache
def training_scenes(num_moves: int) -> tuple[ToyScene, ...]:
    """The scenes with ``num_moves`` movements that training clips are drawn from."""
    return tuple(s for s in all_scenes(num_moves) if not is_held_out(s))


def held_out_prompts(count: int, *, seed: int, num_moves: Sequence[int] = (1, 2)) -> tuple[str, ...]:
    """Different captions that no toy training clip has, with equally many of each number of movements.

    Args:
        count: How many.
        seed: Chooses which.
        num_moves: Numbers of movements to take in turn.
    Raises:
        ConfigError: There are not so many.
    """
    keys = Keys(seed)
    pools: list[list[str]] = []
    for n in num_moves:
        held_out = [s.caption for s in all_scenes(n) if is_held_out(s)]
        ranks = torch.empty(len(held_out), dtype=torch.float64).uniform_(generator=keys.generator("toy-prompts", sample=n))
        pools.append([held_out[i] for i in ranks.argsort().tolist()])
    most = len(pools) * min(len(p) for p in pools)
    if count > most:
        raise ConfigError(f"{count} held-out toy prompts were asked for, and there are {most}; ask for at most {most}")
    return tuple(pools[i % len(pools)][i // len(pools)] for i in range(count))
