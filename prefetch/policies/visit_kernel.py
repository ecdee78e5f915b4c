# mypy: allow-untyped-calls
"""What a visit of a layer does to values, for policies that need a few numbers for each expert.

All take visit, int64, see below; shares, float64 [n], of no elements for decoded tokens; the policy's table, see
`selection_kernel`, whose VALUE and USED_AT are updated; and state, float64 [numbers, keys], updated.
"""

from __future__ import annotations

from typing import Any

from prefetch.jit import entry, inner
from prefetch.policies.selection_kernel import COST, USED_AT, VALUE

# The first places of a visit: layer, its first key, its end, the visits of any layer so far, how many keys follow.
LAYER, FIRST, END, CLOCK, COUNT, VISIT_KEYS = range(6)

_SIGNATURE = "void(int64[::1], float64[::1], float64[:, ::1], float64[:, ::1], {})"


@inner
def keys_of(visit: Any) -> Any:
    """int64 [n], the keys of a visit, each once."""
    return visit[VISIT_KEYS : VISIT_KEYS + visit[COUNT]]


@inner
def note_use(visit: Any, table: Any) -> None:
    """The keys were used now."""
    for key in keys_of(visit):
        table[USED_AT, key] = visit[CLOCK]


@inner
def _share(shares: Any, index: int) -> Any:
    """How much a use counts."""
    return shares[index] if len(shares) else 1.0


@inner
def _decay_and_add(visit: Any, shares: Any, row: Any, decay: float, weight: float) -> None:
    """Row = decay x row + weight x uses."""
    for key in range(visit[FIRST], visit[END]):
        row[key] *= decay
    for index in range(visit[COUNT]):
        row[visit[VISIT_KEYS + index]] += weight * _share(shares, index)


@inner
def _value(visit: Any, table: Any, row: Any) -> None:
    """VALUE = cost x row."""
    for key in range(visit[FIRST], visit[END]):
        table[VALUE, key] = table[COST, key] * row[key]


@entry("void(int64[::1], float64[:, ::1])")
def touch(visit: Any, table: Any) -> None:
    """Values come from elsewhere."""
    note_use(visit, table)


@entry(_SIGNATURE.format("float64, float64"))
def blend(visit: Any, shares: Any, table: Any, state: Any, decay: float, weight: float) -> None:
    """State's only row = decay x row + weight x uses, which is the value but for the cost."""
    note_use(visit, table)
    _decay_and_add(visit, shares, state[0], decay, weight)
    _value(visit, table, state[0])


@entry(_SIGNATURE.format("float64"))
def frequency_recency(visit: Any, shares: Any, table: Any, state: Any, decay: float) -> None:
    """Frequency decays as in `blend`; only decoded uses are recent: a prefill says little of what the next token needs.

    Rows of state: frequency, tokens since the last use.
    """
    note_use(visit, table)
    frequency, since = state[0], state[1]
    _decay_and_add(visit, shares, frequency, decay, 1.0)
    for key in range(visit[FIRST], visit[END]):
        since[key] += 1.0
    if len(shares) == 0:
        for key in keys_of(visit):
            since[key] = 0.0
    for key in range(visit[FIRST], visit[END]):
        table[VALUE, key] = table[COST, key] * frequency[key] / (since[key] + 1.0)


@entry(_SIGNATURE.format("int64[::1], int64"))
def count_window(visit: Any, shares: Any, table: Any, state: Any, tokens: Any, length: int) -> None:
    """Rows of state: uses in the window before, in the one that runs; tokens, int64 [layers], how long that one is."""
    note_use(visit, table)
    before, running = state[0], state[1]
    if tokens[visit[LAYER]] >= length:
        before[visit[FIRST] : visit[END]] = running[visit[FIRST] : visit[END]]
        running[visit[FIRST] : visit[END]] = 0.0
        tokens[visit[LAYER]] = 0
    tokens[visit[LAYER]] += 1
    _decay_and_add(visit, shares, running, 1.0, 1.0)
    for key in range(visit[FIRST], visit[END]):
        table[VALUE, key] = table[COST, key] * (before[key] + running[key])
