"""What `group_pairs` must find, one pair after the other."""

from __future__ import annotations


def group_pairs_reference(ids: list[int], here: list[bool], block_tokens: int) -> list[tuple[int, list[int]]]:
    """(expert, its pairs) of every tile that is used, by expert, then by pair.

    Args:
        ids: expert of each pair.
        here: whether each expert has a bundle.
        block_tokens: most pairs of a tile.
    """
    pairs_of: dict[int, list[int]] = {}
    for pair, expert in enumerate(ids):
        if 0 <= expert < len(here) and here[expert]:
            pairs_of.setdefault(expert, []).append(pair)
    return [
        (expert, pairs[first : first + block_tokens])
        for expert, pairs in sorted(pairs_of.items())
        for first in range(0, len(pairs), block_tokens)
    ]
