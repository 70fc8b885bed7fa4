"""Published weights under this project's names: strict, so that no parameter silently keeps or loses a value."""

# S tokens per frame, T frames, D width

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - only to name what torch.load(weights_only=True) raises when it refuses

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from opensora_dist.core.errors import WeightsError
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.positions import Positions, sincos_1d, sincos_2d

# A table that went through bfloat16 is off by up to 2^-9; a wrong scale or grid, by far more.
_TABLE_TOLERANCE = 4e-3


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did besides giving every parameter its value.

    Args:
        missing: Names the file lacks, which keep their initial values.
        unexpected: Names the model lacks.
        ignored: Names the file has and the model computes.
        warnings: What a user should look at before training, one sentence each.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]


def read_open_sora(path: Path, model: VideoTransformer) -> tuple[dict[str, Tensor], ImportReport]:
    """Weights of Open-Sora 1.0's STDiT. Its position tables are compared with the model's formula, not loaded.

    Args:
        path: A .safetensors or .pth file, its tensors bare or under "state_dict".
        model: Gives names, shapes and scales; may be on the meta device.
    Returns:
        Whole tensors for ``init.assign_weights``, and the report.
    Raises:
        WeightsError: An unreadable file, or every missing and unexpected name and every other shape.
    """
    tensors = _read(path)
    tables = {name: tensors.pop(name) for name in ("pos_embed", "pos_embed_temporal") if name in tensors}
    warnings = [w for name, table in tables.items() for w in _position_warnings(name, table, model.positions)]
    return tensors, _check(path, tensors, model, ignored=list(tables), warnings=warnings, may_miss=lambda name: False)


def read_pixart(path: Path, model: VideoTransformer) -> tuple[dict[str, Tensor], ImportReport]:
    """Weights of the PixArt-alpha image model. Temporal attention keeps its initial values, whose output is zero.

    Arguments, results and errors as ``read_open_sora``. ``pos_embed`` is dropped: positions follow ``model.space_scale``.
    """
    tensors = _read(path)
    ignored = ["pos_embed"] if tensors.pop("pos_embed", None) is not None else []
    patch = "x_embedder.proj.weight"
    if patch in tensors and tensors[patch].dim() == 4:
        tensors[patch] = tensors[patch].unsqueeze(2)  # [D, C, ph, pw]: a patch of one frame
    report = _check(path, tensors, model, ignored=ignored, warnings=[], may_miss=lambda name: ".attn_temp." in name)
    return tensors, report


def _read(path: Path) -> dict[str, Tensor]:
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            return tensors
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise WeightsError(
                f"model.init_from.path={path}: unknown suffix {path.suffix!r}; use .safetensors, .pth, .pt or .bin"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"model.init_from.path={path}: no such file") from error
    except UnpicklingError as error:
        raise WeightsError(
            f"model.init_from.path={path}: not plain tensors: damaged, or holds objects whose loading could run code; "
            "download it again, or convert it to .safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(
            f"model.init_from.path={path}: unreadable, damaged or not a weights file ({error}); check it, or download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"model.init_from.path={path}: must be a dict of tensors, bare or under 'state_dict'")
    return dict(content)


def _check(
    path: Path,
    tensors: dict[str, Tensor],
    model: VideoTransformer,
    *,
    ignored: list[str],
    warnings: list[str],
    may_miss: Callable[[str], bool],
) -> ImportReport:
    """The report, if names and shapes are the model's; else every difference in one error."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    problems = [f"missing: {name}" for name in missing if not may_miss(name)]
    problems += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in unexpected]
    for name, tensor in tensors.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            problems.append(f"other shape: {name} is {tuple(tensor.shape)}, the model has {shapes[name]}")
    if problems:
        raise WeightsError(
            f"model.init_from.path={path} doesn't fit the model; check model.init_from.format, model.name, model.size, "
            "model.patch and the data set's channels, text width and tokens:\n  " + "\n  ".join(problems)
        )
    return ImportReport(missing=tuple(missing), unexpected=tuple(unexpected), ignored=tuple(ignored), warnings=tuple(warnings))


def _position_warnings(name: str, table_1LD: Tensor, positions: Positions) -> list[str]:
    """Says where a position table is not what the model computes, and which scale would give it, if one does."""
    width = positions.width
    if table_1LD.dim() != 3 or table_1LD.shape[::2] != (1, width) or not table_1LD.numel():
        return [f"the file's {name} has shape {tuple(table_1LD.shape)}, not [1, tokens, {width}]: it can't be compared"]
    table = table_1LD[0].double()
    if name == "pos_embed":
        field, scale, columns = "model.space_scale", positions.space_scale, _columns(table)
        rows = len(table) // columns
        second_column = table[1, : width // 2] if columns > 1 else None
        matches = _matcher(table, lambda s: sincos_2d(rows, columns, width=width, scale=s))
    else:
        field, scale = "model.time_scale", positions.time_scale
        second_column = table[1] if len(table) > 1 else None
        matches = _matcher(table, lambda s: sincos_1d(len(table), width=width, scale=s))
    if matches(scale):
        return []
    said = f"the file's {name} is not what {field}={scale:g} gives"
    guess = None if second_column is None else _scale_of(second_column)
    if guess is None or not matches(guess):
        return [f"{said}, nor what any scale does that can be read off it: the weights were trained with other positions"]
    return [f"{said}: it matches {field}={guess:g}"]


def _matcher(table_LD: Tensor, formula: Callable[[float], Tensor]) -> Callable[[float], bool]:
    def matches(scale: float) -> bool:
        expected = formula(scale)
        return expected.shape == table_LD.shape and bool((expected - table_LD).abs().max() <= _TABLE_TOLERANCE)

    return matches


def _columns(table_SD: Tensor) -> int:
    """Tokens in a row: the second half of the channels encodes the row, so the first token where it changes starts the second."""
    row_part = table_SD[:, table_SD.shape[1] // 2 :]
    changed = (row_part - row_part[0]).abs().amax(1) > _TABLE_TOLERANCE
    return int(changed.int().argmax()) or len(table_SD)


def _scale_of(row: Tensor) -> float | None:
    """The scale for which ``row`` encodes index 1, whose angles are frequency / scale; None if they are nil."""
    half = len(row) // 2
    channel = half // 4  # frequency 0.1: the angle is neither lost in rounding nor, at scales over 1/31, past half a turn
    angle = math.atan2(row[channel], row[half + channel])
    return float(f"{10000.0 ** -(channel / half) / angle:.6g}") if angle > 0 else None
