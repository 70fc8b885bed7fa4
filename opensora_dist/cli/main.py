"""Entry point: verbs, exit codes, errors as text rather than tracebacks.

Exit codes: 0 done, or saved and stopped on request; 1 failed; 2 bad usage or config.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from opensora_dist import __version__
from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.logging import setup_logging
from opensora_dist.resilience.endings import noted

# Verb to the module that adds and runs it. A verb's own imports happen when it runs, so that --help is quick.
_VERBS = (
    *("demo", "data", "train", "sample", "evaluate", "plan", "ckpt", "bench", "report"),
    *("submit", "status", "logs", "cancel", "node", "doctor"),
)

# What a machine refuses is no bug of ours, so it needs no traceback; any other OSError keeps its own.
_MACHINE_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or write elsewhere, and start the same command again",
    errno.EDQUOT: "the quota is used up: free some space, or write elsewhere, and start the same command again",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "check the owner and the mode of that path, or use another",
    errno.EPERM: "check the owner and the mode of that path, or use another",
}


def run() -> NoReturn:
    """The process's entry point: runs a verb and exits with its code."""
    try:
        code = main()
    except Exception:  # noqa: BLE001 - it is shown, and ends the process as any other does
        traceback.print_exc()
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        # gloo's threads (torch 2.13) may drop their last tensor while the interpreter shuts down, which aborts the process after its
        # work is done, even with the process group destroyed; and after an error, communicators would wait for transfers that no rank
        # answers. Everything is flushed, so nothing is lost by not shutting down.
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    try:
        return noted(lambda: _run_verb(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OpensoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _MACHINE_REMEDIES:
            raise
        print(f"error: {error}; {_MACHINE_REMEDIES[error.errno]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _run_verb(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="opensora-dist",
        description="Train video diffusion transformers, from raw video to sampled video.",
        epilog="`opensora-dist demo` shows everything at once, on this machine.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in _VERBS:
        importlib.import_module(f"opensora_dist.cli.{verb}").add_parser(verbs)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)  # for verbs that start ranks of themselves
    setup_logging()
    code = args.run(args)
    assert isinstance(code, int)
    return code
