"""Drawing toy clips: a plan of one clip (a pure function of seed and index), and its frames."""

# T frames, H W height, width of the frame in pixels; x grows rightwards, y downwards, both in pixels from the top left corner

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames
from opensora_dist.parallel.keys import Keys
from opensora_dist.prepare.toy.grammar import COLOURS, DIRECTIONS, MAX_MOVES, SIZES, ToyScene, training_scenes

Floats = NDArray[np.float64]

BACKGROUNDS = ("gradient", "stripes", "checks", "noise")
_MARGIN = 0.02  # of the shorter side, kept free at the frame's edge
_TRAVEL = {1: (0.8, 1.0), 2: (0.6, 1.0)}  # by number of movements: least and greatest share of the free way that each takes


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """What toy clips look like, apart from the scene.

    Args:
        sizes: (height, width) in pixels to draw from; even, as H.264 needs them, and at least 32.
        lengths: Numbers of frames to draw from; at least 8.
        fps: Frames per second of the files.
        moves: Numbers of movements to draw from.
        texture: Contrast of the background, 0 (plain grey) to 1.
        levels: Least and greatest mean grey of the background. Below 60 every object is brighter than what it moves over.
    """

    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96), (96, 64), (128, 128))
    lengths: tuple[int, ...] = (16, 24, 32)
    fps: float = 8.0
    moves: tuple[int, ...] = (1, 2)
    texture: float = 1.0
    levels: tuple[float, float] = (70.0, 170.0)

    def __post_init__(self) -> None:
        problems = [
            f"toy {name}=() is empty; give at least one" for name in ("sizes", "lengths", "moves") if not getattr(self, name)
        ]
        problems += [
            f"toy size {h}x{w}: height and width must be even and at least 32; use e.g. {max(32, h + h % 2)}x{max(32, w + w % 2)}"
            for h, w in self.sizes
            if h % 2 or w % 2 or min(h, w) < 32
        ]
        problems += [f"toy length {t} is too short to show a movement; use at least 8 frames" for t in self.lengths if t < 8]
        problems += [f"toy moves={n} must be between 1 and {MAX_MOVES}" for n in self.moves if not 1 <= n <= MAX_MOVES]
        if not self.fps > 0:
            problems.append(f"toy fps={self.fps} must be positive; use e.g. 8")
        if not 0 <= self.texture <= 1:
            problems.append(f"toy texture={self.texture} must lie between 0 and 1")
        if not 0 <= self.levels[0] <= self.levels[1] <= 255:
            problems.append(f"toy levels={self.levels} must be two grey levels in order, between 0 and 255; use e.g. 70 170")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class ToyClip:
    """One clip before it is drawn.

    Args:
        scene: What it shows.
        shape: Frames, height, width.
        scale: Square root of the object's area, in pixels.
        centres: The object's centre of mass in each frame, (x, y) in pixels.
        background: One of ``BACKGROUNDS``.
        backdrop: The background, uint8 [H, W, 3].
    """

    scene: ToyScene
    shape: Thw
    scale: float
    centres: tuple[tuple[float, float], ...]
    background: str
    backdrop: NDArray[np.uint8]


def extents(shape: str) -> tuple[float, float, float, float]:
    """How far a shape of area 1 reaches from its centre of mass: left, right, up, down."""
    if shape == "circle":
        return (math.sqrt(1 / math.pi),) * 4
    if shape == "square":
        return (0.5,) * 4
    if shape == "triangle":
        side = math.sqrt(4 / math.sqrt(3))
        inradius = side / (2 * math.sqrt(3))
        return side / 2, side / 2, 2 * inradius, inradius
    assert shape == "cross", shape
    return (math.sqrt(9 / 5) / 2,) * 4


def coverage(shape: str, *, centre: tuple[float, float], scale: float, height: int, width: int) -> Floats:
    """How much of each pixel an object covers, 0 to 1.

    Args:
        shape: One of ``grammar.SHAPES``.
        centre: Its centre of mass, (x, y) in pixels.
        scale: Square root of its area, in pixels.
    Returns:
        [height, width]: anti-aliased, from the signed distance of the pixel's centre to the outline.
    """
    x = (np.arange(width) + 0.5 - centre[0])[None, :]
    y = (np.arange(height) + 0.5 - centre[1])[:, None]
    reach = extents(shape)[3] * scale  # the distance from the centre of mass to the outline, or to an arm's end
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - reach
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - reach
    elif shape == "triangle":
        distance = np.maximum(y, abs(x) * (math.sqrt(3) / 2) - y / 2) - reach
    else:
        arm = reach / 3
        distance = np.minimum(np.maximum(abs(x) - reach, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - reach))
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0))


def plan_clip(index: int, *, keys: Keys, options: ToyOptions) -> ToyClip:
    """Clip ``index`` of the set of one seed: equal arguments give the same clip, and no other clip has a say in it."""
    draws = iter(torch.empty(32, dtype=torch.float64).uniform_(generator=keys.generator("toy-clip", sample=index)).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(next(draws))

    def pick(count: int) -> int:
        return min(int(next(draws) * count), count - 1)

    height, width = options.sizes[pick(len(options.sizes))]
    length = options.lengths[pick(len(options.lengths))]
    scenes = training_scenes(options.moves[pick(len(options.moves))])
    scene = scenes[pick(len(scenes))]
    background = BACKGROUNDS[pick(len(BACKGROUNDS))]
    scale = SIZES[scene.size] * min(height, width)

    left, right, up, down = extents(scene.shape)
    margin = _MARGIN * min(height, width)
    low = (left * scale + margin, up * scale + margin)
    high = (width - right * scale - margin, height - down * scale - margin)
    free = (high[0] - low[0], high[1] - low[1])
    corners = [(0.0, 0.0)]
    for move in scene.moves:
        share = between(*_TRAVEL[len(scene.moves)])
        step = DIRECTIONS[move]
        corners.append((corners[-1][0] + step[0] * share * free[0], corners[-1][1] + step[1] * share * free[1]))
    # The path is laid anywhere that keeps it inside the frame. "left, then right" never needs more than the longer of its moves.
    path = np.array(corners)
    for axis in (0, 1):
        lowest, highest = path[:, axis].min(), path[:, axis].max()
        path[:, axis] += between(low[axis] - lowest, high[axis] - highest)
    time = np.linspace(0, len(scene.moves), length)
    centres = [tuple(np.interp(t, np.arange(len(path)), path[:, axis]) for axis in (0, 1)) for t in time]

    backdrop = _backdrop(
        background,
        height=height,
        width=width,
        contrast=options.texture,
        levels=options.levels,
        draws=[next(draws) for _ in range(8)],
        generator=keys.generator("toy-background", sample=index),
    )
    return ToyClip(
        scene=scene,
        shape=Thw(length, height, width),
        scale=scale,
        centres=tuple((float(x), float(y)) for x, y in centres),
        background=background,
        backdrop=backdrop,
    )


def render(clip: ToyClip) -> Frames:
    """The frames of a clip, uint8 [T, H, W, 3]."""
    colour = np.array(COLOURS[clip.scene.colour], dtype=np.float64)
    frames = []
    for centre in clip.centres:
        cover = coverage(clip.scene.shape, centre=centre, scale=clip.scale, height=clip.shape.h, width=clip.shape.w)[..., None]
        frames.append(np.rint(clip.backdrop * (1 - cover) + colour * cover).astype(np.uint8))
    return np.stack(frames)


def _backdrop(
    kind: str,
    *,
    height: int,
    width: int,
    contrast: float,
    levels: tuple[float, float],
    draws: list[float],
    generator: torch.Generator,
) -> NDArray[np.uint8]:
    """A still texture, nearly grey, so that whatever has colour is the object. ``draws`` are uniform on [0, 1)."""
    level, angle, phase, period, tint_angle, tint = draws[:6]
    x = np.arange(width)[None, :] / min(height, width)
    y = np.arange(height)[:, None] / min(height, width)
    along = x * math.cos(2 * math.pi * angle) + y * math.sin(2 * math.pi * angle)
    cycles = 2 + 3 * period
    if kind == "gradient":
        wave = 2 * (along - along.min()) / (along.max() - along.min()) - 1
    elif kind == "stripes":
        wave = np.sin(2 * math.pi * (cycles * along + phase))
    elif kind == "checks":
        # tanh rather than sign: soft edges, as a camera would give
        wave = np.tanh(4 * np.sin(math.pi * (cycles * x + phase)) * np.sin(math.pi * (cycles * y + period)))
    else:
        coarse = torch.empty(1, 1, 6, 6).normal_(generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        wave = np.tanh(smooth[0, 0].double().numpy())
    grey = levels[0] + (levels[1] - levels[0]) * level + 32 * contrast * wave
    hue = 2 * math.pi * tint_angle
    # A tint of at most 8 grey levels, orthogonal to luma to first order: well below any object's colour.
    shade = 8 * tint * np.array([math.cos(hue), -0.5 * math.cos(hue), math.sin(hue)])
    return np.asarray(np.rint(np.clip(grey[..., None] + shade, 0, 255)), dtype=np.uint8)
