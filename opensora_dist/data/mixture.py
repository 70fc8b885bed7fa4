"""The data that a config names, one data set or several, opened as one index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from opensora_dist.config.data_rules import mixture_name
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.train import DataConfig, MixtureConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import read_header
from opensora_dist.core.types import Thw
from opensora_dist.data.index import DataSet, Index, read_spec
from opensora_dist.data.remote import localise
from opensora_dist.data.streams import make_groups

_AGREE = ("codec", "text", "channels", "spatial_factor", "temporal_factor", "text_width", "max_tokens")


def open_data(data: DataConfig, *, max_lost: int = 0) -> Index:
    """Opens ``data.path``, or all of ``data.mixture`` as one.

    Of several data sets, keys begin with the set's name. Latent statistics are pooled over all latents, as often as training sees them.

    Args:
        max_lost: As in ``Index.open``.
    Raises:
        ConfigError: Nothing is named, or names are not unique.
        DataError: A data set can't be used, or they were not made alike.
    """
    entries = data.mixture
    if not entries:
        if data.path is None:
            raise ConfigError("data.path is not set; make a data set with `opensora-dist data prepare` and pass data.path=FOLDER")
        entries = (MixtureConfig(path=data.path, layout=data.layout),)
    names = [mixture_name(e) for e in entries] if len(entries) > 1 else [""]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"data.mixture has several data sets named {', '.join(map(repr, twice))}; give each a `name` of its own"
        )
    located = [localise(e.path, cache=data.cache, allow_pipe=data.allow_pipe, layout=e.layout) for e in entries]
    sets = [DataSet(at=at, name=name, weight=e.weight) for at, name, e in zip(located, names, entries)]
    if len(sets) == 1:
        return Index.join(sets, max_lost=max_lost)
    specs = [read_spec(s.folder, read_header(s.folder)) for s in sets]
    _check_alike(sets, specs)
    return pooled(Index.join(sets, spec=specs[0], max_lost=max_lost), specs, image_share=data.image_share)


def pooled(index: Index, specs: Sequence[DatasetSpec], *, image_share: float | None = None) -> Index:
    """The index with a spec for all: buckets of all, and mean and std of all latents together, as often as an epoch has them: weights
    and shares count, so that what the model sees has mean 0 and std 1.

    Args:
        specs: Of each of its data sets.
        image_share: As ``data.image_share``.
    """
    of_set = np.zeros(len(specs))
    for group in make_groups(index, image_share=image_share):
        number = int(np.searchsorted(index.set_starts, group.rows[0], side="right")) - 1
        of_set[number] += group.use * index.latent_of(group.bucket).volume
    share = (of_set / of_set.sum())[:, None]
    means, stds = (np.array([getattr(s, f"latent_{name}") for s in specs]) for name in ("mean", "std"))
    mean, std = specs[0].latent_mean, specs[0].latent_std
    if (means != means[0]).any() or (stds != stds[0]).any():
        middle = (share * means).sum(axis=0)
        mean = tuple(middle.tolist())
        std = tuple(np.sqrt((share * (stds**2 + (means - middle) ** 2)).sum(axis=0)).tolist())
    buckets = sorted(index.buckets, key=lambda bucket: (-len(index.buckets[bucket]), bucket))
    moving = [s.fps for s in specs if any(Thw(*bucket).t > 1 for bucket in s.buckets)]
    spec = specs[0].model_copy(
        update={
            "latent_mean": mean,
            "latent_std": std,
            "buckets": tuple(tuple(bucket) for bucket in buckets),
            "fps": moving[0] if moving else specs[0].fps,
        }
    )
    return index.with_spec(spec)


def _check_alike(sets: Sequence[DataSet], specs: Sequence[DatasetSpec]) -> None:
    """
    Raises:
        DataError: They were made by different codecs or text encoders, or their videos have different rates.
    """
    problems = []
    for field in _AGREE:
        values = {s.name: getattr(spec, field) for s, spec in zip(sets, specs)}
        if any(value != getattr(specs[0], field) for value in values.values()):
            problems.append(f"{field}: " + ", ".join(f"{name} has {value}" for name, value in values.items()))
    rates = {s.name: spec.fps for s, spec in zip(sets, specs) if any(Thw(*bucket).t > 1 for bucket in spec.buckets)}
    if len(set(rates.values())) > 1:
        problems.append("fps: " + ", ".join(f"{name} has {rate:g}" for name, rate in rates.items()))
    latents: dict[Thw, dict[Thw, str]] = {}
    for one in sets:
        for shape in read_header(one.folder).shapes:
            latents.setdefault(shape.clip, {}).setdefault(shape.latent, one.name)
    problems += [
        f"latents of {clip} clips: " + ", ".join(f"{name} has {latent}" for latent, name in found.items())
        for clip, found in latents.items()
        if len(found) > 1
    ]
    if problems:
        raise DataError(
            f"data.mixture: its data sets were not made alike, so that one model can't train on them ({'; '.join(problems)}); prepare "
            "them with the same codec, text encoder and clip.fps, or leave some out"
        )
