"""Paged layers do what transformers' plain ones do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from offload.devices.host import HostDevice
from offload.errors import SlowKvWarning, UnsupportedOperationError
from offload.hf.paged.layer import PagedLayer
from offload.hf.paged.states import CachedStates
from offload.kv.paging import Paging
from tests.kv.tables import SETTINGS


@pytest.fixture
def paging(tmp_path: Path) -> Iterator[Paging]:
    paging = Paging(HostDevice(), 50 * 4096, tmp_path, settings=SETTINGS)
    yield paging
    paging.check()
    paging.close()


def _new(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.randn(batch, 2, tokens, 16, generator=generator), torch.randn(batch, 2, tokens, 8, generator=generator)


def _assert_same(paged: PagedLayer, plain: DynamicLayer) -> None:
    assert paged.get_seq_length() == plain.get_seq_length()
    assert paged.get_mask_sizes(3) == plain.get_mask_sizes(3)
    assert paged.keys is not None and paged.values is not None
    assert torch.equal(paged.keys, plain.keys) and torch.equal(paged.values, plain.values)


def test_changes_are_those_of_a_plain_layer(paging: Paging) -> None:
    paged, plain = PagedLayer(paging), DynamicLayer()
    assert paged.get_seq_length() == 0 and paged.keys is None
    for step, tokens in enumerate((37, 1, 1, 20)):
        for layer in (paged, plain):
            layer.update(*_new(tokens, seed=step))
        _assert_same(paged, plain)
    for layer in (paged, plain):
        layer.crop(-9)
        layer.update(*_new(2))
    _assert_same(paged, plain)
    for layer in (paged, plain):
        layer.reorder_cache(torch.tensor([1, 1]))
        layer.batch_repeat_interleave(2)
        layer.update(*_new(3, batch=4))
        layer.batch_select_indices(torch.tensor([3, 0]))
    _assert_same(paged, plain)
    for layer in (paged, plain):
        layer.reset()
        layer.update(*_new(5))
    _assert_same(paged, plain)


def test_the_first_tokens_are_handed_on_and_later_ones_are_not_gathered(paging: Paging) -> None:
    layer = PagedLayer(paging)
    keys, values = _new(30)
    assert layer.update(keys, values) == (keys, values)
    found = layer.update(*_new(1))
    assert all(type(states) is CachedStates for states in found)
    assert found[0].shape == (2, 2, 31, 16) and found[1].shape == (2, 2, 31, 8)
    with pytest.warns(SlowKvWarning, match="computes with its cached keys"):
        total = found[0].sum()
    assert torch.allclose(total, keys.sum() + _new(1)[0].sum(), atol=1e-4)
    statistics = paging.statistics()
    assert statistics is not None and statistics.gathered_steps == 1


def test_a_copy_shares_and_does_not_follow(paging: Paging) -> None:
    layer = PagedLayer(paging)
    layer.update(*_new(40))
    other = copy.deepcopy(layer)
    plain = DynamicLayer()
    plain.update(*_new(40))
    other.update(*_new(3))
    _assert_same(layer, plain)
    plain.update(*_new(3))
    _assert_same(other, plain)


def test_a_pickle_is_a_plain_layer(paging: Paging) -> None:
    layer = PagedLayer(paging)
    layer.update(*_new(20))
    plain = pickle.loads(pickle.dumps(layer))
    assert type(plain) is DynamicLayer
    _assert_same(layer, plain)


def test_assignment_is_refused_with_what_to_do(paging: Paging) -> None:
    layer = PagedLayer(paging)
    layer.update(*_new(4))
    with pytest.raises(UnsupportedOperationError, match="crop"):
        layer.keys = torch.zeros(1)


def test_tokens_of_a_plain_layer_are_taken_over(paging: Paging) -> None:
    cache = DynamicCache()
    cache.update(*_new(50), 0)
    layer = PagedLayer(paging)
    layer.adopt(cache.layers[0].keys, cache.layers[0].values)
    _assert_same(layer, cache.layers[0])
