"""What is not to be trained on: word lists for captions, detectors for frames. Each says why a clip is refused, or nothing."""

# N frames of a clip: uint8 RGB [N, H, W, 3]

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from opensora_dist.config.load import expand
from opensora_dist.config.prepare import SafetyConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.extras import require_extra
from opensora_dist.core.io import read_utf8
from opensora_dist.core.registry import Registry
from opensora_dist.core.video import Frames, evenly_spaced
from opensora_dist.prepare.clean import INVISIBLE

# Runs of letters and digits; a Han or kana character is a word, since nothing parts them where they are written.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_MARKS = frozenset({"Mn", "Me"})  # accents, and what is drawn around letters
_FILLERS = re.compile("[\u115f\u1160]")  # letters that are blank
_VOICED = re.compile("[\u3041-\u30fe][\u3099\u309a]")  # not an accent: ga is another syllable than ka


class TextSafety:
    """A list of words and phrases that no caption may hold.

    The file has one a line; empty lines and lines that start with # are skipped. Whole words count, in any case, with or without
    accents, invisible characters and HTML entities; a phrase is words in a row, whatever stands between them.

    A reason names the line of the file, never the word: reports are shown and shared, and lists of this kind are hard to look at.

    Args:
        config: ``safety`` of a preparation. Without ``words`` nothing is refused.
    Raises:
        ConfigError: The file can't be read, or holds nothing.
    """

    def __init__(self, config: SafetyConfig) -> None:
        self._lines = {} if config.words is None else _read_words(config.words)
        self._lengths = sorted({len(phrase) for phrase in self._lines})

    def refuses(self, caption: str) -> str | None:
        """The reason, or None."""
        for instead in ("", " "):  # what can't be seen may stand in a word, or between two
            words = _folded(caption, instead)
            for length in self._lengths:
                for start in range(len(words) - length + 1):
                    line = self._lines.get(tuple(words[start : start + length]))
                    if line is not None:
                        return f"safety.words: its caption holds what line {line} lists"
        return None


def _read_words(path: str) -> dict[tuple[str, ...], int]:
    """Folded phrase to the first line that has it.

    Raises:
        ConfigError: As ``TextSafety``.
    """
    try:
        lines = read_utf8(expand(path)).splitlines()
    except OSError as error:
        raise ConfigError(
            f"safety.words={path!r}: can't be read ({error}); give a text file with one word or phrase a line"
        ) from error
    found: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(lines, start=1):
        if (phrase := tuple(_folded(line))) and not line.lstrip().startswith("#"):
            found.setdefault(phrase, number)
    if not found:
        raise ConfigError(f"safety.words={path!r} lists no word; write one a line, or drop safety.words")
    return found


def _folded(text: str, instead: str = "") -> list[str]:
    """Words without case and accents, with ``instead`` of what can't be seen; entities and compatible forms as the plain ones."""
    while (plain := html.unescape(text)) != text:
        text = plain
    text = _FILLERS.sub(" ", unicodedata.normalize("NFKD", INVISIBLE.sub(instead, text.casefold())))
    text = _VOICED.sub(lambda pair: unicodedata.normalize("NFC", pair[0]), text)
    kinds = ((char, unicodedata.category(char)) for char in text)
    return _WORD.findall("".join(instead if kind == "Cf" else char for char, kind in kinds if kind not in _MARKS).casefold())


class ImageDetector(Protocol):
    """What looks at frames. An entry of ``IMAGE_DETECTORS`` makes one of a config and a device."""

    def detect(self, frames_NHW3: Frames) -> Sequence[tuple[str, float]]:
        """(class, confidence from 0 to 1) of everything found on any of the frames, whether it counts or not."""
        ...


IMAGE_DETECTORS: Registry[Callable[[SafetyConfig, torch.device], ImageDetector]] = Registry("safety.images")


class ImageSafety:
    """A detector that looks at frames of a clip; what it finds of ``safety.image_classes``, with enough confidence, refuses it.

    Args:
        config: ``safety`` of a preparation. With ``images: none`` nothing is refused.
        device: Where the detector runs, if it can.
    Raises:
        ConfigError: The detector is not known, or its package isn't installed.
    """

    def __init__(self, config: SafetyConfig, *, device: torch.device) -> None:
        self._config = config
        self._detector = None if config.images == "none" else IMAGE_DETECTORS.get(config.images)(config, device)

    def finds(self, frames_THW3: Frames) -> dict[str, float]:
        """Class to the highest confidence with which it was found, whether it counts or not."""
        if self._detector is None:
            return {}
        found: dict[str, float] = {}
        for name, confidence in self._detector.detect(evenly_spaced(frames_THW3, self._config.image_frames)):
            found[name] = max(float(confidence), found.get(name, 0.0))
        return found

    def refuses(self, frames_THW3: Frames) -> str | None:
        """The reason, with the class found and its confidence, or None."""
        return image_reason(self.finds(frames_THW3), self._config)


def image_reason(found: Mapping[str, float], config: SafetyConfig) -> str | None:
    """Why a clip is refused in which that was found, or None. What a detector found stays true under other thresholds and classes."""
    counted = [(confidence, name) for name, confidence in found.items() if name in config.image_classes]
    if not counted or max(counted)[0] < config.image_threshold:
        return None
    confidence, name = max(counted)
    return f"safety.images={config.images}, {name}: confidence {confidence:.2f}"


@IMAGE_DETECTORS.register("nudenet")
class NudeNet:
    """nudenet's YOLOv8n, whose ONNX file ships in its package; on the CPU with one thread, since workers share a machine."""

    def __init__(self, config: SafetyConfig, device: torch.device) -> None:
        require_extra("nudenet", extra="safety", wanted_by=f"safety.images={config.images}")
        import nudenet
        import onnxruntime

        self._detector: Any = nudenet.NudeDetector()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # The package takes no options for the session it makes.
        model = Path(nudenet.__file__).with_name("320n.onnx")
        self._detector.onnx_session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def detect(self, frames_NHW3: Frames) -> list[tuple[str, float]]:
        """As ``ImageDetector``; classes are nudenet's 18 labels."""
        as_cv2 = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames_NHW3]  # BGR, as files are read by the package
        return [(found["class"], found["score"]) for frame in as_cv2 for found in self._detector.detect(frame)]
