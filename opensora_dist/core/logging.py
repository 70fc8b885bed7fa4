"""One logger for the package: plain lines on stderr, one prefix per rank, warnings once."""

from __future__ import annotations

import logging
import os
import sys

_ROOT = "opensora_dist"


def setup_logging(*, level: str = "INFO", rank: int = 0, world: int = 1) -> None:
    """Sends the package's log to stderr. Ranks other than 0 show warnings only, with their rank in front."""
    logger = logging.getLogger(_ROOT)
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if world > 1 and rank != 0 else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname).1s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(os.environ.get("OPENSORA_LOG_LEVEL", level) if rank == 0 else "WARNING")


def get_logger(name: str) -> logging.Logger:
    """The logger of one module: ``get_logger(__name__)``."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")
