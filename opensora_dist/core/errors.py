"""The errors a user can meet. Each names the field, the value, the rule and the way out."""

from __future__ import annotations

from collections.abc import Iterable


class OpensoraError(Exception):
    """Base of every error that is about the user's input or machine rather than about our own logic."""


class ConfigError(OpensoraError):
    """One or more problems in a config. All of them are reported at once.

    Args:
        problems: One sentence per problem, each naming field, value, rule and remedy.
        source: The config's file, shown in the heading.
    """

    def __init__(self, problems: str | Iterable[str], *, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        where = f" in {source}" if source else ""
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''}{where}:"
        super().__init__("\n".join([heading, *(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))]))


class DeviceError(ConfigError):
    """A config asks for a device that isn't there: a mistake where a run is tried, a failed driver where it had passed its checks."""


class DataError(OpensoraError):
    """Input data (a video, a caption table, a shard, an index) can't be used as it is."""


class CheckpointError(OpensoraError):
    """A checkpoint can't be found, verified, read or written."""


class WeightsError(OpensoraError):
    """Foreign weights don't fit the model they are loaded into."""


class CommunicationError(OpensoraError):
    """Another rank is gone, is late, or does something else than this one."""


class TrainingError(OpensoraError):
    """A run goes wrong in a way that more of the same won't mend: numbers, copies that differ, restarts without progress."""
