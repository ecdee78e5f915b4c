"""Static layers take tokens over from those of a `DynamicCache` and hand them back."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from offload.hf.fused.kv_cache import GrowingLayer
from offload.hf.graphs.layers import FullLayer, StateLayer, WindowLayer

WINDOW = 5


def _tokens(count: int, seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(2, 3, count, width, generator=torch.Generator().manual_seed(seed))


def _filled(past: int) -> tuple[GrowingLayer, torch.Tensor, torch.Tensor]:
    """A layer whose values are narrower than its keys, and what it holds."""
    layer = GrowingLayer()
    keys, values = _tokens(past, 1), _tokens(past, 2, width=3)
    layer.update(keys, values)
    return layer, keys, values


def test_a_full_layer_writes_where_the_dynamic_one_shows() -> None:
    layer, keys, values = _filled(7)
    position = torch.tensor([7])
    static = FullLayer(position, 16, layer.keys, layer.values)
    assert static.suits(layer)
    assert static.take_over(layer, 7)
    for past in (7, 8):
        position.fill_(past)
        new_keys, new_values = _tokens(1, past), _tokens(1, past + 10, width=3)
        static.update(new_keys, new_values)
        static.hand_back(layer, past)
        assert layer.get_seq_length() == past + 1
        keys, values = torch.cat((keys, new_keys), 2), torch.cat((values, new_values), 2)
        assert static.suits(layer)
        assert static.take_over(layer, past + 1)
        assert layer.__dict__["_ahead"] is not None, "views are made when somebody looks"
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    # Layers' own code goes on in the same buffers.
    layer.update(_tokens(2, 30), _tokens(2, 31, width=3))
    assert layer.keys.data_ptr() == static.keys.data_ptr()
    assert static.take_over(layer, 11)
    layer.crop(-4)
    assert static.take_over(layer, 7)


def test_a_rearranged_layer_is_not_taken_over_again() -> None:
    layer, keys, _ = _filled(6)
    static = FullLayer(torch.tensor([6]), 16, layer.keys, layer.values)
    assert static.take_over(layer, 6)
    looked_at = layer.keys
    layer.reorder_cache(torch.tensor([1, 0]))
    assert not static.take_over(layer, 6)
    assert torch.equal(looked_at, keys)
    other, _, _ = _filled(6)
    assert static.take_over(other, 6), "another layer's tokens may come"


def test_a_layer_that_changes_under_a_replay_is_noticed() -> None:
    layer, _, _ = _filled(6)
    static = FullLayer(torch.tensor([6]), 16, layer.keys, layer.values)
    static.take_over(layer, 6)
    layer.update(_tokens(1, 1), _tokens(1, 2, width=3))
    with pytest.raises(RuntimeError, match="changed while"):
        static.hand_back(layer, 6)


def test_a_part_of_the_same_buffers_moves_within_them() -> None:
    layer, keys, values = _filled(6)
    static = FullLayer(torch.tensor([0]), 16, layer.keys, layer.values)
    layer.move_to((static.keys, static.values))
    layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
    layer.move_to((static.keys, static.values))
    assert torch.equal(layer.keys, keys[:, :, 2:])
    assert torch.equal(layer.values, values[:, :, 2:])
    assert layer.lies_in((static.keys, static.values), 4)


def test_offered_buffers_are_used_once_and_by_the_layer_alone() -> None:
    import copy

    like, _, _ = _filled(1)
    static = FullLayer(torch.tensor([0]), 8, like.keys, like.values)
    buffers = static.keys, static.values
    layer = GrowingLayer()
    layer.offer(buffers)
    twin = copy.copy(layer)
    twin.update(_tokens(3, 1), _tokens(3, 2, width=3))
    assert not twin.lies_in(buffers, 3)
    layer.update(_tokens(3, 1), _tokens(3, 2, width=3))
    assert layer.lies_in(buffers, 3)
    layer.keys, layer.values = layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone()
    layer.update(_tokens(1, 5), _tokens(1, 6, width=3))
    assert not layer.lies_in(buffers, 2), "what was written there before may be looked at"
    for tokens, dtype in ((9, torch.float32), (3, torch.float64)):
        large = GrowingLayer()
        large.offer(buffers)
        large.update(_tokens(tokens, 1).to(dtype), _tokens(tokens, 2, width=3).to(dtype))
        assert large.get_seq_length() == tokens
        assert not large.lies_in(buffers, tokens)


@pytest.mark.parametrize("past", [1, WINDOW - 2, WINDOW - 1, WINDOW, 12])
def test_a_window_gives_what_the_dynamic_one_would(past: int) -> None:
    layer, plain = (DynamicSlidingWindowLayer(sliding_window=WINDOW) for _ in range(2))
    for one in (layer, plain):
        one.update(_tokens(past, 1), _tokens(past, 2))
    static = WindowLayer(torch.tensor([past]), WINDOW, layer.keys, layer.values)
    static.keys.fill_(torch.nan)
    for step in range(3):
        assert static.take_over(layer, past + step)
        new = _tokens(1, 20 + step), _tokens(1, 40 + step)
        attended = plain.update(*new)
        found = static.update(*new)
        static.hand_back(layer, past + step)
        held = min(past + step + 1, WINDOW)
        for mine, its in zip(found, attended, strict=True):
            assert torch.equal(mine[:, :, -held:], its[:, :, -held:])
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)
        assert layer.get_seq_length() == plain.get_seq_length()
    # In the middle the layers' own code takes a turn.
    for one in (layer, plain):
        one.update(_tokens(1, 70), _tokens(1, 71))
    static.keys.fill_(torch.nan)
    static.take_over(layer, past + 4)
    assert torch.equal(static.keys[:, :, 1 - WINDOW :][:, :, -min(past + 4, WINDOW - 1) :], plain.keys)


def test_states_are_copied_once_and_shared_then() -> None:
    layer = LinearAttentionLayer()
    layer.update_conv_state(torch.randn(2, 6, 4))
    layer.update_recurrent_state(torch.randn(2, 3, 5))
    static = StateLayer(layer)
    assert static.suits(layer)
    before = [state.clone() for state in (layer.conv_states[0], layer.recurrent_states[0])]
    static.take_over(layer, 9)
    assert all(map(torch.equal, static.buffers(), before))
    static.update_recurrent_state(torch.zeros(2, 3, 5))
    assert torch.equal(layer.recurrent_states[0], before[1])
    static.hand_back(layer, 9)
    assert layer.recurrent_states[0] is static.recurrent_states[0]
    layer.activate_past_recording()
    assert not static.suits(layer)
