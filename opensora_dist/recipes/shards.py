"""Samples spread over ranks: from the shapes of latents, which data have, to shards of tokens, which models work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

from opensora_dist.config.load import Problem
from opensora_dist.config.train import ModelConfig, SpConfig
from opensora_dist.core.types import Share, Thw
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.models.base import VideoTransformer
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.agree import Agreement, Intent
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.layout import SequenceParallel, scheme_problems


def share_problems(sp: SpConfig, model: ModelConfig, grids: Mapping[str, Thw]) -> list[Problem]:
    """What keeps ranks from sharing samples; a rule that several shapes break is said once, with all of them.

    Args:
        grids: Token grids, by what an error calls the samples that have them.
    """
    broken: dict[str, list[str]] = {}
    for what, grid in grids.items():
        for problem in scheme_problems(sp, grid, heads=model.shape.heads, joint=model.name == "dit"):
            broken.setdefault(problem, []).append(what)
    fields = ("parallel.sp", "model.heads", "model.size", "model.name")
    return [Problem(fields=fields, message=f"{problem} ({', '.join(whose)})") for problem, whose in broken.items()]


class LatentShards:
    """This rank's part of samples, by their latent shape."""

    def __init__(self, mesh: Mesh, sequences: SequenceParallel, model: VideoTransformer) -> None:
        self._sequences, self._model = sequences, model
        self._agreement = Agreement(mesh)

    def shard(self, latent: Thw) -> Shard:
        """The tokens of samples of this shape that are held here, and how they meet the others."""
        return self._sequences.shard(self._model.token_grid(latent))

    def share(self, latent: Thw) -> Share:
        """Which samples of a batch, and which latents of each, are read here."""
        return self._sequences.share(self._model.token_grid(latent), patch=self._model.patch)

    def agree(self, data: StepData, parts: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Makes sure that the ranks that share these samples are about to do the same with them. Collective over them.

        Args:
            parts: What is run at once.
        Returns:
            The parts; where one of these ranks could not read a sample, with what all of them take in its place.
        Raises:
            CommunicationError: On all of them, where they are about to do different things.
        """
        bad = self._agreement.check([self._intent(data, micro) for micro in parts])
        return [self._substituted(data, micro) if some else micro for micro, some in zip(parts, bad, strict=True)]

    def _intent(self, data: StepData, micro: MicroBatch) -> Intent:
        return Intent(
            step=data.step,
            digest=data.digest,
            samples=micro.samples,
            latent=micro.latent,
            part=Thw(*micro.latents_BCthw.shape[2:]),
            text_tokens=micro.text_BYE.shape[1],
            dtype=micro.latents_BCthw.dtype,
            shard=self.shard(micro.latent),
            patch=self._model.patch,
            num_bad=sum(why is not None for why in micro.bad),
        )

    def _substituted(self, data: StepData, micro: MicroBatch) -> MicroBatch:
        """With other samples for those that any rank that shares them could not read. Collective over the ranks that agreed."""
        sharing = self._agreement.sharing(self.shard(micro.latent))
        for attempt in count():  # ends: an order has a last substitute, after which a sample counts for nothing
            bad = self._agreement.bad_anywhere([why is not None for why in micro.bad], sharing=sharing)
            if bad is None:
                return micro
            if attempt == 0 and self._agreement.answers(sharing=sharing):
                micro = replace(micro, replaced=sum(bad))
            micro = data.substitute(micro, bad, attempt)
        raise AssertionError
