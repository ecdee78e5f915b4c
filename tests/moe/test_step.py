"""The MoE step on a real tier: right, the same whatever is resident, and harmless when it fails."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from offload.errors import ClosedError, StorageError, StoreCorruptError
from tests.moe.rig import KINDS, Rig
from tests.tiers.children import exit_code_of

MakeRig = Callable[..., Rig]

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# One token; some, few for each expert; many: on both sides of where matrix products take over from the kernel.
TOKENS = [1, 3, 15, 40]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_against_float64(make_rig: MakeRig, accumulator: str, kind: str, format: str, tokens: int) -> None:
    rig = make_rig(kind=kind, format=format)
    for layer in (0, 1, 0):
        inputs = rig.inputs(tokens, top_k=2, seed=layer)
        rig.assert_close(rig.step(layer, *inputs), rig.reference(layer, *inputs))
        rig.assert_idle()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["silu", "unknown"])
def test_the_bits_do_not_depend_on_slots_or_residents(
    make_rig: MakeRig, accumulator: str, kind: str, format: str, tokens: int
) -> None:
    expected = None
    for slots in range(1, 13):
        rig = make_rig(kind=kind, format=format, slots=slots, threads=1 + slots % 3)
        chance = random.Random(slots)
        for number in range(4):
            inputs = rig.inputs(tokens, top_k=3, seed=7)
            found = rig.step(0, *inputs)
            if expected is None:
                expected = found
                rig.assert_close(found, rig.reference(0, *inputs))
            assert torch.equal(found, expected), f"differs with {slots} slots"
            # Another layer and other tokens leave others behind.
            rig.step(1, *rig.inputs(chance.randint(1, 4), top_k=2, seed=number))
            rig.tier.fetch([chance.randrange(6)], lambda _key: None)
            rig.assert_idle()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("slots", [1, 2, 4, 12])
def test_in_turn_the_bits_are_the_same(
    make_rig: MakeRig, accumulator: str, slots: int, tokens: int, format: str
) -> None:
    rig, other = make_rig(slots=slots, format=format), make_rig(slots=12, format=format)
    for seed in range(4):
        inputs = rig.inputs(tokens, top_k=3, seed=seed)
        assert torch.equal(rig.step(seed % 2, *inputs, in_turn=True), other.step(seed % 2, *inputs))
        rig.assert_idle()


@pytest.mark.parametrize("in_turn", [True, False])
def test_reads_ahead_may_follow_once_the_steps_own_have_begun(make_rig: MakeRig, in_turn: bool) -> None:
    rig = make_rig(slots=6)
    loading: list[int] = []

    class Watch:
        prefill = False

        def loads_started(self) -> None:
            loading.append(rig.tier.loading)

        def waiting(self) -> None:
            pass

    rig.tier.fetch([0, 1], lambda _key: None)
    rig.step(0, *rig.inputs(2, top_k=6), watch=Watch(), in_turn=in_turn)
    assert loading == [4]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 6, 12])
def test_every_expert_is_read_at_most_once(make_rig: MakeRig, accumulator: str, slots: int) -> None:
    rig = make_rig(slots=slots, format="fp32")
    reads: Counter[int] = Counter()
    rig.before_read = lambda key: reads.update([key])
    chunks = rig.layout.nbytes // 4096
    for seed in range(8):
        inputs = rig.inputs(5, top_k=3, seed=seed)
        resident = set(rig.tier.table)
        rig.step(0, *inputs)
        routed = set(inputs[1].flatten().tolist())
        assert set(reads) <= routed
        assert set(reads.values()) <= {chunks}
        assert routed - resident <= set(reads)
        if accumulator == "pairs":
            assert set(reads) == routed - resident, "what was resident was read"
        reads.clear()


def test_residents_are_computed_while_misses_load(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=6)
    inputs = rig.inputs(4, top_k=6)
    rig.tier.fetch([0, 1, 2], lambda _key: None)
    started: list[int] = []
    run = rig.device.run_experts

    def watch(*arguments: object) -> None:
        started.append(len(rig.tier._tickets))
        run(*arguments)  # type: ignore[arg-type]

    rig.device.run_experts = watch  # type: ignore[method-assign]
    rig.assert_close(rig.step(0, *inputs), rig.reference(0, *inputs))
    assert started[0] == 3, "reads begin before the first computation"


def test_no_tokens(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig()
    found = rig.step(0, *rig.inputs(0, top_k=2))
    assert found.shape == (0, 24)
    assert found.dtype is torch.float32
    rig.assert_idle()


def test_dropped_pairs_are_not_computed_or_read(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=2)
    hidden, index, weights = rig.inputs(12, top_k=3)
    weights[index == 4] = 0
    index[index == 5] = rig.count + 3
    found = rig.step(0, hidden, index, weights)
    rig.assert_close(found, rig.reference(0, hidden, index, weights))
    assert not {offset // rig.layout.nbytes for offset, _ in rig.reader.calls} & {4, 5}
    nothing = rig.step(0, hidden, torch.full_like(index, rig.count), weights)
    assert torch.equal(nothing, torch.zeros_like(hidden))


def test_hidden_states_in_any_layout(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig()
    hidden, index, weights = rig.inputs(20, top_k=2)
    expected = rig.step(0, hidden, index, weights)
    wide = torch.stack([hidden, torch.full_like(hidden, float("nan"))], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    found = rig.step(0, wide, index.T.contiguous().T, weights.T.contiguous().T)
    assert torch.equal(found, expected)
    assert torch.equal(rig.step(0, hidden, index.int(), weights), expected)


def test_the_default_device_does_not_matter(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig()
    inputs = rig.inputs(20, top_k=2)
    expected = rig.step(0, *inputs)
    with torch.device("meta"):
        found = rig.step(0, *inputs)
    assert torch.equal(found, expected)


def test_inputs_are_left_alone(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig()
    inputs = rig.inputs(20, top_k=2)
    before = [tensor.clone() for tensor in inputs]
    rig.step(0, *inputs)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("slots", [1, 2, 4, 12])
def test_a_step_that_fails_is_as_if_it_had_not_been(make_rig: MakeRig, accumulator: str, slots: int, seed: int) -> None:
    chance = random.Random(seed)
    rig = make_rig(slots=slots, threads=chance.randint(1, 3))
    inputs = rig.inputs(chance.choice(TOKENS), top_k=chance.randint(1, 6), seed=seed)
    rig.step(1, *rig.inputs(2, top_k=2, seed=seed))
    left = chance.randint(0, 4)
    bad = chance.choice([StorageError(errno.EIO, "broken"), StoreCorruptError("flipped"), MemoryError()])
    rig.break_reads(left, bad)
    try:
        found = rig.step(0, *inputs)
    except type(bad) as caught:
        assert caught is bad
    else:
        rig.assert_close(found, rig.reference(0, *inputs))
    rig.assert_idle()
    rig.before_read = lambda _key: None
    rig.assert_close(rig.step(0, *inputs), rig.reference(0, *inputs))
    rig.assert_idle()


def test_a_device_that_fails(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=3)
    inputs = rig.inputs(9, top_k=4)
    run = rig.device.run_experts
    for failing in range(6):
        calls = 0

        def fail(*arguments: object, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls > failing:
                raise RuntimeError("no memory for scratch")
            run(*arguments)  # type: ignore[arg-type]

        rig.device.run_experts = fail  # type: ignore[method-assign]
        try:
            rig.step(0, *inputs)
        except RuntimeError as error:
            assert "no memory" in str(error)
        rig.assert_idle()
    rig.device.run_experts = run  # type: ignore[method-assign]
    rig.assert_close(rig.step(0, *inputs), rig.reference(0, *inputs))


def test_after_closing(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=3)
    inputs = rig.inputs(9, top_k=4)
    rig.step(0, *inputs)
    rig.engine.close()
    rig.tier.release_memory()
    with pytest.raises(ClosedError):
        rig.step(0, *inputs)
    rig.assert_idle()


def test_in_a_forked_child(make_rig: MakeRig, accumulator: str) -> None:
    rig = make_rig(slots=3, threads=4)
    inputs = rig.inputs(3, top_k=4)
    expected = rig.step(0, *inputs)

    def child() -> None:
        for _ in range(3):
            assert torch.equal(rig.step(0, *inputs), expected)
            rig.step(1, *inputs)
            rig.assert_idle()

    assert exit_code_of(child) == 0
    assert torch.equal(rig.step(0, *inputs), expected)
    rig.assert_idle()
