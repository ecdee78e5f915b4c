"""Layers that stream through a window: their weights when they run, and what becomes of copies that fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from offload.devices.host_accelerator import HostAccelerator
from offload.devices.link import Link, LinkReader
from offload.errors import StorageError
from offload.hf.dense_weights import DenseWeights, alignment_nbytes
from offload.hf.dense_window import DenseWindow
from offload.hf.quantised_linear import QuantisedLinear
from tests.devices.test_link import FakeClock

LAYERS, WIDTH = 5, 24


class Layer(nn.Module):
    """A linear layer, a packed one, a buffer, and a scalar."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(WIDTH, WIDTH, generator=generator)
        self.linear = nn.Linear(WIDTH, WIDTH + seed % 2, bias=True)
        self.linear.weight.data = torch.randn(WIDTH + seed % 2, WIDTH, generator=generator)
        self.packed = QuantisedLinear(weight, torch.zeros(WIDTH), "int8", "packed")
        self.register_buffer("offset", torch.randn(WIDTH, 2, generator=generator)[:, 1])
        self.scale = nn.Parameter(torch.tensor(float(seed + 1)))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.tanh(self.packed(x) + self.linear(x)[:, :WIDTH]) + self.offset


@pytest.fixture
def layers() -> list[Layer]:
    return [Layer(seed) for seed in range(LAYERS)]


OpenWindow = Callable[[list[Layer]], DenseWindow]


@pytest.fixture(params=[2, 3])
def open_window(request: pytest.FixtureRequest) -> Iterator[OpenWindow]:
    opened: list[DenseWindow] = []

    def open_it(layers: list[Layer]) -> DenseWindow:
        device = HostAccelerator(1 << 20, Link(1e9))
        device.copy_reader = lambda: LinkReader(Link(1e9), FakeClock())  # type: ignore[method-assign]
        opened.append(DenseWindow(device, layers, request.param))
        return opened[-1]

    yield open_it
    for window in opened:
        window.close()


def run(layers: list[Layer], seed: int = 0) -> torch.Tensor:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    for layer in layers:
        x = layer(x)
    return x


def test_passes_compute_what_they_do_without_it(layers: list[Layer], open_window: OpenWindow) -> None:
    expected = [run(layers, seed) for seed in range(4)]
    addresses = [layer.linear.weight.data_ptr() for layer in layers]
    window = open_window(layers)
    slots = {slot.address for slot in window._slots}
    seen: list[int] = []
    for layer in layers:
        layer.linear.register_forward_hook(lambda module, *_: seen.append(module.weight.data_ptr()))
    for seed, result in enumerate(expected):
        assert torch.equal(run(layers, seed), result)
    sizes = [weights.nbytes for weights in window._weights]
    assert all(any(first <= address < first + max(sizes) for first in slots) for address in seen)
    assert not set(addresses) & {layer.linear.weight.data_ptr() for layer in layers}
    # One copy of each layer for each pass, and those that are on their way for the next.
    assert window.loads == 4 * LAYERS + len(window._slots)
    window.close()
    assert window.bytes_copied <= sum(sizes) * 4 + len(slots) * max(sizes)


def test_a_pass_that_fails_leaves_the_next_one_whole(layers: list[Layer], open_window: OpenWindow) -> None:
    expected = run(layers)
    window = open_window(layers)

    def fail(*_: object) -> None:
        raise StorageError("no such sector")

    for number in range(LAYERS):
        hook = layers[number].linear.register_forward_pre_hook(fail)
        with pytest.raises(StorageError):
            run(layers)
        hook.remove()
        assert not window._lock.locked()
        assert torch.equal(run(layers), expected)


def test_a_copy_that_fails_is_reported_and_made_again(
    layers: list[Layer], open_window: OpenWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(layers)
    open_window(layers)
    assert torch.equal(run(layers), expected)

    def fail(*_: object) -> None:
        raise StorageError("the link is down")

    monkeypatch.setattr(LinkReader, "read", fail)
    with pytest.raises(StorageError, match="link is down"):
        for _ in range(2):
            run(layers)
    monkeypatch.undo()
    assert torch.equal(run(layers), expected)


def test_an_interrupt_within_a_layer_lets_the_same_thread_go_on(layers: list[Layer], open_window: OpenWindow) -> None:
    expected = run(layers)
    open_window(layers)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = layers[3].linear.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(layers)
    hook.remove()
    assert torch.equal(run(layers), expected)


def test_several_threads(layers: list[Layer], open_window: OpenWindow) -> None:
    expected = [run(layers, seed) for seed in range(3)]
    open_window(layers)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not torch.equal(run(layers, seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_take_no_more_than_is_reserved(layers: list[Layer]) -> None:
    whole = nn.ModuleList(layers)
    tensors = [*whole.parameters(), *whole.buffers()]
    exact = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parts = [DenseWeights([layer]).nbytes for layer in layers]
    alone = max(sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers())) for layer in layers)
    assert exact <= DenseWeights([whole]).nbytes == sum(parts)
    assert sum(parts) + 2 * max(parts) <= exact + 2 * alone + alignment_nbytes(whole, layers, quantised=False)


def test_a_tensor_of_two_modules_is_laid_out_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    both = DenseWeights([first, second])
    assert both.nbytes == 64
    assert DenseWeights([first, second], leave=[second]).nbytes == 0
    slab = both.move_to(HostAccelerator(4096, Link(1e9)))
    assert first.weight.data_ptr() == second.weight.data_ptr() == slab.address
