"""How the ranks share a micro-batch: equally many units each, and about equally much work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def deal(costs: Sequence[int], loads: list[int]) -> list[list[int]]:
    """Deal units out to ranks, in numbers that differ by one at most.

    In rounds, the costliest units first: each rank gets one, the rank with the least work so far the costliest.
    Then the ranks with the most and the least work exchange the units that bring them closest, while that helps.

    Args:
        costs: What each unit costs, in tokens.
        loads: The work of each rank so far, one entry per rank; the dealt units are added to it.

    Returns:
        For each rank its units, by index, in ascending order.
    """
    shares: list[list[int]] = [[] for _ in loads]
    costliest_first = sorted(range(len(costs)), key=lambda unit: -costs[unit])
    for start in range(0, len(costs), len(loads)):
        takers = sorted(range(len(loads)), key=loads.__getitem__)
        for unit, taker in zip(costliest_first[start:], takers, strict=False):
            shares[taker].append(unit)
            loads[taker] += costs[unit]
    cost: NDArray[np.int64] = np.asarray(costs, dtype=np.int64)
    for _ in range(2 * len(loads)):
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        gains = np.subtract.outer(cost[shares[most]], cost[shares[least]])
        gains[(gains <= 0) | (gains >= gap)] = 0
        if not gains.any():
            break
        given, taken = np.unravel_index(np.abs(2 * gains - gap).argmin(), gains.shape)
        shares[most][given], shares[least][taken] = shares[least][taken], shares[most][given]
        loads[most] -= int(gains[given, taken])
        loads[least] += int(gains[given, taken])
    return [sorted(share) for share in shares]
