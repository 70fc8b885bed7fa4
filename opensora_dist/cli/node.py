"""``opensora-dist node``: what a job's script asks on its nodes. Not for people."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb and its own verbs."""
    node = verbs.add_parser(
        "node",
        help="for scripts: what a job asks on its nodes",
        description=(
            "For the scripts that `opensora-dist submit` makes: begin and end of an attempt, and the checks of nodes before it. SUBMISSION\n"
            "is a folder in launch/ of a run directory. docs/slurm.md and docs/reliability.md say what follows from what."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = node.add_subparsers(dest="action", required=True, metavar="ACTION")
    begin = _add(actions, "begin", _begin, "an attempt begins: 0 go on, 20 nothing to do, 21 of no use")
    _add_attempt(begin, task=True)
    end = _add(actions, "end", _end, "an attempt ended: 0 done, 10 start it again, 11 it failed, 12 a user stopped it")
    _add_attempt(end, task=True)
    end.add_argument("--code", type=int, required=True, metavar="RC", help="of what started the ranks, or of the preflight")
    end.add_argument("--stopped-by", choices=["user", "scheduler"], help="who asked it to stop, where the script knows")
    resubmitted = _add(actions, "resubmitted", _resubmitted, "another job goes on, without nodes that are unfit")
    _add_attempt(resubmitted, task=False)
    resubmitted.add_argument("job_id", metavar="JOBID", help="the scheduler's")
    preflight = _add(actions, "preflight", _preflight, "this node looks at itself")
    _add_attempt(preflight, task=False)
    _add_node(preflight)
    links = _add(actions, "links", _links, "all ranks try their links: 1 where one isn't good enough")
    _add_attempt(links, task=False)
    _add_node(links)
    links.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    verdict = _add(
        actions, "verdict", _verdict, "what the checks say: 0 all fit, 30 those printed are unfit, 31 none can be blamed"
    )
    _add_attempt(verdict, task=False)
    verdict.add_argument("nodes", nargs="+", metavar="NODE", help="all nodes of the job, in its order")

    _add_pool(actions)


def _add(actions: Any, name: str, run: Any, says: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=says, description=says)
    parser.add_argument("submission", type=Path, metavar="SUBMISSION", help="its folder, as in runs/x/launch/0001")
    parser.set_defaults(run=run)
    return parser


def _add_pool(actions: Any) -> None:
    pool = _add(
        actions, "pool", _pool, "a pod or a rented machine runs its part of a job: 0 done, 75 start all again, else failed"
    )
    pool.add_argument("--rank", type=int, required=True, metavar="N", help="this node's number; 0 decides for all")
    pool.add_argument("--nodes", type=int, required=True, metavar="N", help="how many")
    pool.add_argument("--head", required=True, metavar="ADDRESS", help="of node 0")
    pool.add_argument("--port", type=int, required=True, metavar="P", help="of node 0, and the one after it")
    pool.add_argument("--grace-s", type=float, required=True, metavar="S", help="for saving, once told to stop by SIGTERM")


def _add_attempt(parser: argparse.ArgumentParser, *, task: bool) -> None:
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    name = f"{job}.{restarts}" if job else None
    says = "the scheduler's job, and its restarts so far (default: Slurm's)"
    parser.add_argument("--attempt", default=name, required=name is None, metavar="JOB.RESTART", help=says)
    if task:
        parser.add_argument("--task", metavar="NAME", help="of several with attempts of their own: of an array")


def _add_node(parser: argparse.ArgumentParser) -> None:
    name = os.environ.get("SLURMD_NODENAME", platform.node())
    parser.add_argument("--node", default=name, metavar="NAME", help="this one's, as the scheduler has it")


def _begin(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import begin

    return begin(args.submission, attempt=args.attempt, task=args.task)


def _end(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import end
    from opensora_dist.resilience.attempts import StoppedBy

    stopped_by = None if args.stopped_by is None else StoppedBy(args.stopped_by)
    return end(args.submission, attempt=args.attempt, code=args.code, stopped_by=stopped_by, task=args.task)


def _resubmitted(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import resubmitted

    resubmitted(args.submission, attempt=args.attempt, job_id=args.job_id)
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import look_at_node

    return look_at_node(args.submission, attempt=args.attempt, node=args.node)


def _links(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import try_links

    return try_links(args.submission, attempt=args.attempt, node=args.node, device=args.device)


def _verdict(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.node import judge_nodes

    return judge_nodes(args.submission, attempt=args.attempt, nodes=args.nodes)


def _pool(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.pool import PoolNode, run_node

    node = PoolNode(rank=args.rank, nodes=args.nodes, head=args.head, port=args.port, grace_s=args.grace_s)
    return run_node(args.submission, node=node)
