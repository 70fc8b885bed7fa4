"""What links that are slow or cut say of the nodes at their ends."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

Pair = tuple[str, str]


def cut_off(unreachable: Sequence[Pair]) -> list[str]:
    """The fewest nodes without which every two reach each other; none where both ends of a link are as likely."""
    left = {frozenset(pair) for pair in unreachable}
    found: list[str] = []
    while left:
        (worst, count), *others = Counter(node for pair in left for node in pair).most_common()
        if others and others[0][1] == count:
            return []
        found.append(worst)
        left = {pair for pair in left if worst not in pair}
    return found


def slow_nodes(pairs: Mapping[Pair, float], *, share: float) -> dict[str, float]:
    """Nodes all of whose links are slow, with what part of others' best link theirs is; none of two.

    Args:
        share: A node is slow whose part is less.
    """
    best: dict[str, float] = {}
    for pair, rate in pairs.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), rate)
    if len(best) < 3:
        return {}
    usual = statistics.median_high(best.values())
    return {node: rate / usual for node, rate in best.items() if rate < share * usual}
