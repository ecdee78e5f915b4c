# mypy: allow-untyped-defs
"""Kernels of choosing blocks by score and of listing what was chosen, into memory that the caller keeps."""

from __future__ import annotations

import numpy as np

from cpu_kernels.jit import entry, inner

_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1
_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS


@inner
def _rank(score, bits):
    """An integer that orders scores, a NaN above all."""
    if score != score:
        return np.int64(_HIGHEST)
    number = np.int64(bits)
    return number if number >= 0 else np.int64(_LOWEST) - number - 1


@inner
def _rank_blocks(scores, bits, valid, sequence, block_tokens, always, ranks):
    """Ranks of a head's blocks: those of padding alone come last, the first others that are always chosen first."""
    left = always
    for column in range(len(scores)):
        some = len(valid) == 0
        token, end = column * block_tokens, (column + 1) * block_tokens
        while not some and token < end:
            some = valid[sequence, token] != 0
            token += 1
        if not some:
            ranks[column] = _LOWEST
        elif left > 0:
            ranks[column] = _HIGHEST
            left -= 1
        else:
            ranks[column] = _rank(scores[column], bits[column])


@inner
def _threshold(ranks, count, histogram):
    """The count-th largest rank, digit after digit from the highest, and how many of it are among the largest."""
    prefix, left = np.int64(0), count
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram[:] = 0
        for column in range(len(ranks)):
            number = ranks[column] - _LOWEST
            if number >> (shift + _DIGIT_BITS) == prefix:
                histogram[(number >> shift) & (_DIGITS - 1)] += 1
        digit = _DIGITS - 1
        while histogram[digit] < left:
            left -= histogram[digit]
            digit -= 1
        prefix = prefix << _DIGIT_BITS | digit
    return prefix + _LOWEST, left


@entry(
    "void(float32[:, :, ::1], int32[:, :, ::1], uint8[:, :], int64, int64, int64[::1], int64[::1], int64[:, :, ::1])"
)
def choose_largest(scores, bits, valid, block_tokens, always, ranks, histogram, chosen):
    """The blocks with the largest scores; of equal ones the first.

    scores: [B, Hk, C]; bits: the same memory. valid: [B, S], zero where a token is padding, or [0, 0]. always: see
    `choose_blocks`. ranks: [C], scratch. histogram: [256], scratch. chosen: [B, Hk, count], written, ascending.
    """
    sequences, heads, _ = scores.shape
    count = chosen.shape[2]
    for sequence in range(sequences):
        for head in range(heads):
            _rank_blocks(scores[sequence, head], bits[sequence, head], valid, sequence, block_tokens, always, ranks)
            least, equals = _threshold(ranks, count, histogram)
            place = 0
            for column in range(len(ranks)):
                take = ranks[column] > least
                if ranks[column] == least and equals > 0:
                    take = True
                    equals -= 1
                if take:
                    chosen[sequence, head, place] = column
                    place += 1


@inner
def _unite(chosen, marks, union):
    """The columns that any head chose, ascending; how many."""
    marks[:] = 0
    heads, count = chosen.shape
    for head in range(heads):
        for number in range(count):
            marks[chosen[head, number]] = 1
    found = 0
    for column in range(len(marks)):
        if marks[column]:
            union[found] = column
            found += 1
    return found


@entry(
    "int64(int64[:, :, ::1], int64[:, :], int64[::1], int64, int64, int64, uint8[:, :], uint8[::1], int64[:, ::1],"
    "int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint8[:, ::1], int64[::1])"
)
def list_chosen(
    chosen, blocks, addresses, unit_blocks, block_tokens, head_nbytes, valid, marks, unions, counts, listed, offsets,
    lengths, firsts, starts, mask, cold,
):  # fmt: skip
    """Lists of blocks of each head, cut into units where the union of all heads' choices has so many blocks.

    List (b Hk + h) units + u is what head h of sequence b chose of unit u; a head's lists are one after the other.
    Units of which a block has no address are left empty.

    chosen: [B, Hk, m], ascending. blocks: [B, columns or more], numbers. addresses: by number. head_nbytes: of a block.
    valid: see `choose_largest`. marks: [columns], scratch. Written: unions [B, ...] and their lengths counts [B],
    listed [B Hk m], addresses; offsets [lists + 1], lengths and first positions firsts [lists], in a head's chosen
    tokens; starts [lists], where in a head's choice a list begins; mask [B Hk, m block_tokens] if there is a valid;
    cold [B units], sequence times units plus unit of those left empty. Returns how many.
    """
    sequences, heads, count = chosen.shape
    units = len(lengths) // (sequences * heads)
    left_out = 0
    offsets[0] = 0
    for sequence in range(sequences):
        found = counts[sequence] = _unite(chosen[sequence], marks, unions[sequence])
        union = unions[sequence]
        for unit in range(units):
            low, high = min(unit * unit_blocks, found), min((unit + 1) * unit_blocks, found)
            here = True
            for number in range(low, high):
                here = here and addresses[blocks[sequence, union[number]]] != 0
            if not here:
                cold[left_out] = sequence * units + unit
                left_out += 1
            marks[unit] = here
        for head in range(heads):
            row = sequence * heads + head
            number = 0
            for unit in range(units):
                low, high = min(unit * unit_blocks, found), min((unit + 1) * unit_blocks, found)
                index, start = row * units + unit, number
                while low < high and number < count and chosen[sequence, head, number] <= union[high - 1]:
                    column = chosen[sequence, head, number]
                    listed[row * count + number] = addresses[blocks[sequence, column]] + head * head_nbytes
                    if len(valid) > 0:
                        for token in range(block_tokens):
                            mask[row, number * block_tokens + token] = valid[sequence, column * block_tokens + token]
                    number += 1
                offsets[index + 1] = offsets[index] + number - start
                lengths[index] = (number - start) * block_tokens if marks[unit] else 0
                firsts[index], starts[index] = start * block_tokens, start
    return left_out
