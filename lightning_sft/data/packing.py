"""How examples are put into bins of so many tokens: best fit for flattened rows, whole rectangles for padded ones."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sft.errors import SFTError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins, each into the fullest bin that still has room for it.

    In descending order of length this is best-fit decreasing: at most 11/9 of the fewest possible bins and four
    more (Johnson et al., 1974), and next to no waste on real lengths (Ding et al., 2024, "Fewer Truncations
    Improve Language Modeling"). How full the bins become, and so their number, depends on the sequence of
    lengths alone.

    The free spaces are the bits of one integer, so the smallest that is large enough takes a shift and the
    lowest bit that is set: under 2 µs an item with a capacity of 8,192.

    Args:
        lengths: Tokens of each item, in the order in which they are put away; none above `capacity`.
        capacity: Most tokens in a bin.

    Returns:
        The items of every bin, by index, in the order in which the bins were opened.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces = 0  # bit `s` is set where `with_space[s]` holds bins with `s` tokens left
    for item, length in enumerate(lengths):
        if enough := spaces >> length:
            space = length + (enough & -enough).bit_length() - 1
            candidates = with_space[space]
            index = candidates.pop()
            if not candidates:
                spaces ^= 1 << space
            bins[index].append(item)
        else:
            index, space = len(bins), capacity
            bins.append([item])
        if left := space - length:
            with_space.setdefault(left, []).append(index)
            spaces |= 1 << left
    return bins


def rectangles(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Cut items into runs so that rows · longest, which is what padded rows compute, stays within `capacity`.

    Args:
        lengths: Tokens of each item in descending order, which keeps padding small; none above `capacity`.
        capacity: Most tokens in a run, padding included.
    """
    runs: list[list[int]] = []
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + capacity // lengths[start])
        runs.append(list(range(start, stop)))
        start = stop
    return runs


def check_options(batch_tokens: int | None, packing: bool, pack_length: int | None, order: str) -> None:
    """Refuse options of a data module that don't go together.

    Raises:
        SFTError: Two ways to make batches are asked for, or an option of one that isn't.
    """
    if packing and batch_tokens is not None:
        raise SFTError(
            "data.batch_tokens and data.packing are both given", where="data", fix="give one of them"
        )
    if pack_length is not None and not packing:
        raise SFTError("pack_length is for packs", where="data.pack_length", fix="set data.packing: true")
    if order == "grouped" and (packing or batch_tokens is not None):
        raise SFTError(
            "examples of similar length are grouped only where batches have a number of examples",
            where="data.order",
            fix=f"leave out {'data.packing' if packing else 'data.batch_tokens'}, or choose another order",
        )
