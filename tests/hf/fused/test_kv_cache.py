"""A growing layer holds what `DynamicLayer` holds, whatever is done with it, and never writes over another's past."""

from __future__ import annotations

import copy
import ctypes
import random

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from offload.hf.fused.kv_cache import ROOM_TOKENS, Followed, Form, GrowingLayer


def _states(tokens: int, batch: int = 2, value_width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    # As projections give them: not contiguous.
    return torch.randn(batch, tokens, 3, 4).transpose(1, 2), torch.randn(batch, tokens, 3, value_width).transpose(1, 2)


def _form(batch: int) -> Form:
    return batch, 3, 4, torch.float32


def _write_as_a_tape(layer: GrowingLayer, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Write one token to the room that the layer gives, by addresses alone; False where it gives none."""
    form = _form(len(keys))
    room = layer.room_for_one(form)
    if room is None:
        return False
    count = len(keys) * 3 * room.tokens * 4
    for address, states in zip(room.addresses, (keys, values), strict=True):
        buffer = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))
        buffer.reshape(len(keys), 3, room.tokens, 4)[:, :, room.past] = states[:, :, 0].numpy()
    layer.took_one(room, form)
    return True


def test_layers_that_one_writer_follows() -> None:
    """Whatever else is done to one of them is seen."""
    layers = [GrowingLayer() for _ in range(3)]
    for layer in layers:
        layer.update(*_states(5, value_width=4))

    def follow(past: int) -> Followed:
        for layer in layers:
            assert _write_as_a_tape(layer, *_states(1, value_width=4))
        followed = Followed(layers)
        assert followed.are_as_left(list(layers), past + 1)
        return followed

    followed = follow(5)
    followed.wrote_one(6)
    assert [layer.get_seq_length() for layer in layers] == [7, 7, 7]
    assert followed.are_as_left(list(layers), 7)
    assert not followed.are_as_left(list(layers), 6)
    assert not followed.are_as_left(layers[:2], 7)
    assert not followed.are_as_left([*layers[:2], copy.deepcopy(layers[2])], 7)
    assert layers[1].keys is not None, "looked at"
    assert not followed.are_as_left(list(layers), 7)
    assert layers[1].keys.shape[2] == 7
    followed = follow(7)
    layers[2].crop(-1)
    assert not followed.are_as_left(list(layers), 8)
    layers[2].update(*_states(1, value_width=4))
    assert not followed.are_as_left(list(layers), 8), "written by another"


OPERATIONS = ["one", "one", "one", "many", "crop", "reorder", "select", "repeat", "reset"]


def _apply(layer: DynamicLayer, operation: str, batch: int, removed: int) -> None:
    if operation == "crop":
        layer.crop(-removed)
    elif operation == "reorder":
        layer.reorder_cache(torch.arange(batch - 1, -1, -1))
    elif operation == "select":
        layer.batch_select_indices(torch.arange(max(1, batch - 1)))
    elif operation == "repeat" and batch < 4:
        layer.batch_repeat_interleave(2)
    elif operation == "reset":
        layer.reset()


@pytest.mark.parametrize("seed", range(8))
def test_equals_concatenation_under_random_operations(seed: int) -> None:
    torch.manual_seed(seed)
    generator = random.Random(seed)
    plain, growing = DynamicLayer(), GrowingLayer()
    for _ in range(120):
        operation = generator.choice(OPERATIONS)
        tokens = plain.get_seq_length()
        batch = plain.keys.shape[0] if tokens else 2
        if operation in ("one", "many"):
            states = _states(1 if operation == "one" else generator.randint(2, 90), batch)
            for found, expected in zip(growing.update(*states), plain.update(*states), strict=True):
                assert torch.equal(found, expected)
        elif tokens:
            for layer in (plain, growing):
                _apply(layer, operation, batch, min(3, tokens - 1))
        assert growing.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("seed", range(8))
def test_equals_concatenation_where_a_tape_writes(seed: int) -> None:
    torch.manual_seed(seed)
    generator = random.Random(seed)
    plain, growing = DynamicLayer(), GrowingLayer()
    written = 0
    for _ in range(200):
        operation = generator.choice([*["tape"] * 12, *OPERATIONS, "copy", "look"])
        tokens = plain.get_seq_length()
        batch = plain.keys.shape[0] if tokens else 2
        if operation in ("one", "many", "tape"):
            states = _states(generator.randint(2, 90) if operation == "many" else 1, batch, 4)
            plain.update(*states)
            if operation == "tape" and _write_as_a_tape(growing, *states):
                written += 1
            else:
                growing.update(*states)
        elif operation == "copy":
            growing = generator.choice([copy.copy, copy.deepcopy])(growing)
        elif operation == "look" and tokens:
            assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)
        elif tokens:
            for layer in (plain, growing):
                _apply(layer, operation, batch, min(3, tokens - 1))
        assert growing.get_seq_length() == plain.get_seq_length()
    if plain.get_seq_length():
        assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)
    assert written > 50


def test_rooms_are_of_the_form_asked_for_and_grow() -> None:
    layer = GrowingLayer()
    assert layer.room_for_one(_form(2)) is None
    layer.update(*_states(5, value_width=4))
    for _ in range(2):
        assert layer.room_for_one(_form(1)) is None
        assert layer.room_for_one((2, 3, 4, torch.bfloat16)) is None
        assert layer.room_for_one((2, 3, 5, torch.float32)) is None
        assert _write_as_a_tape(layer, *_states(1, value_width=4))
    while layer.get_seq_length() < ROOM_TOKENS:
        assert _write_as_a_tape(layer, *_states(1, value_width=4))
    before = layer.keys.clone(), layer.values.clone()
    room = layer.room_for_one(_form(2))
    assert room is not None and (room.tokens, room.past) == (2 * ROOM_TOKENS, ROOM_TOKENS)
    assert room == layer.room_for_one(_form(2))
    keys, values = _states(1, value_width=4)
    assert _write_as_a_tape(layer, keys, values)
    assert torch.equal(layer.keys, torch.cat([before[0], keys], 2))
    assert torch.equal(layer.values, torch.cat([before[1], values], 2))


def test_a_full_layer_that_was_set_back_elsewhere_gets_no_room() -> None:
    layer = GrowingLayer()
    layer.update(*_states(ROOM_TOKENS, value_width=4))
    layer.keys = layer.keys.clone()
    assert layer.room_for_one(_form(2)) is None


def test_values_of_another_width_get_no_room() -> None:
    layer = GrowingLayer()
    layer.update(*_states(5))
    assert layer.room_for_one(_form(2)) is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_what_a_tape_had_written(copied: object) -> None:
    first = GrowingLayer()
    first.update(*_states(5, value_width=4))
    assert _write_as_a_tape(first, *_states(1, value_width=4))
    second = copied(first)  # type: ignore[operator]
    assert second.room_for_one(_form(2)) is None
    assert _write_as_a_tape(first, *_states(1, value_width=4))
    first.reorder_cache(torch.tensor([1, 0]))
    first.update(*_states(1, value_width=4))
    assert second.get_seq_length() == 6
    assert torch.equal(second.keys, first.keys[[1, 0], :, :6]) and torch.equal(
        second.values, first.values[[1, 0], :, :6]
    )


def test_a_token_is_written_in_place() -> None:
    layer = GrowingLayer()
    layer.update(*_states(5))
    before = layer.keys.data_ptr()
    for _ in range(ROOM_TOKENS - 5):
        layer.update(*_states(1))
    assert layer.keys.data_ptr() == before
    layer.update(*_states(1))
    assert layer.keys.data_ptr() != before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(copied: object) -> None:
    first = GrowingLayer()
    first.update(*_states(5))
    second = copied(first)  # type: ignore[operator]
    ones, twos = (torch.full((2, 3, 1, 4), value) for value in (1.0, 2.0))
    values = torch.zeros(2, 3, 1, 5)
    first.update(ones, values)
    second.update(twos, values)
    assert (first.keys[:, :, -1] == 1).all() and (second.keys[:, :, -1] == 2).all()


def test_a_state_that_is_put_back_is_not_written_over() -> None:
    layer = GrowingLayer()
    layer.update(*_states(5))
    kept = layer.keys, layer.values
    layer.update(*_states(3))
    longer = layer.keys.clone(), layer.keys
    layer.keys, layer.values = kept
    layer.update(*_states(2))
    assert torch.equal(longer[1], longer[0])


def test_gradients_go_the_way_of_the_original() -> None:
    layer = GrowingLayer()
    keys, values = _states(2)
    layer.update(keys.requires_grad_(), values)
    layer.update(keys, values)[0].sum().backward()
    assert keys.grad is not None and (keys.grad == 2).all()
