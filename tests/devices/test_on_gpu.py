"""What only a GPU can show: memory, copies and pinning of the real driver, and models at several `vram=`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import offload
from cpu_kernels.threads import ThreadPool
from offload.devices.cuda import CudaDevice
from offload.devices.cuda_driver import open_cuda
from offload.devices.cuda_graph import CudaGraph
from offload.devices.cuda_stream import CudaStream
from offload.devices.doorbell import DoorbellServer
from offload.devices.host import HostDevice
from offload.devices.mailbox import Mailbox, MailboxLayout, collect, mailbox_memory, ring
from offload.devices.pinned import PinnedSlab
from offload.errors import CaptureError, DoesNotFitError, InvalidArgumentError
from offload.tiers.transfer import ReadEngine, ReadRequest, Urgency
from tests.conftest import TinyCheckpoint
from tests.hf.reference import greedy, prompt, reference_model
from tests.moe.rig import Rig
from tests.tiers.readers import random_bytes
from tests.tiny_models import ARCHITECTURES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

VRAM = "1GiB"
BLOCKS_CONTEXT = 16_000
"""Tokens whose cache does not fit into the least `kv_ram`: it lies in blocks."""


def _least_kv_ram(directory: Path, **options: Any) -> int:
    with pytest.raises(InvalidArgumentError, match="two segments to read into") as caught:
        offload.load(directory, kv_ram=1, **options)
    return int(str(caught.value).split("take ")[1].split(" ")[0].replace(",", ""))


@pytest.fixture(params=["cuda:0", "cuda:1"])
def name(request: pytest.FixtureRequest) -> str:
    if int(request.param[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    return str(request.param)


def test_copies_arrive_from_pinned_and_from_pageable_memory(name: str) -> None:
    device = CudaDevice(open_cuda(name), 1 << 28)
    nbytes = 48 << 20
    slab, home = device.allocate(nbytes), device.host().allocate(nbytes)
    assert isinstance(home, PinnedSlab)
    engine = ReadEngine(device.copy_reader(), threads=device.copy_threads, chunk_nbytes=2 << 20)
    for source in (home.bytes(), random_bytes(nbytes, seed=2)):
        source[:] = random_bytes(nbytes, seed=len(source) % 7)
        ticket = engine.submit(ReadRequest(0, source.ctypes.data, slab.tensor(), None, ""), Urgency.NOW)
        engine.wait_all([ticket])
        assert ticket.succeeded
        assert np.array_equal(slab.tensor().cpu().numpy(), source)
    engine.close()
    home.discard(0, 4096)
    assert not home.pinned
    slab.discard(0, nbytes)


def test_the_cap_holds(name: str) -> None:
    driver = open_cuda(name)
    claim = driver.claims.claim(256 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        driver.allocate(512 << 20)
    claim.release()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tokens_are_those_of_transformers(
    model_type: str, name: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """In fp32, in which the last bits decide nothing here."""
    directory = tiny_checkpoint(model_type)
    ids = prompt(batch=2)
    expected = greedy(reference_model(directory, torch.float32), ids)
    slot = offload.plan(directory, ram="1GiB", context=40, batch=2).slot_nbytes
    with pytest.raises(DoesNotFitError, match="of VRAM") as caught:
        offload.load(directory, ram="1GiB", nvme=store_root, context=40, batch=2, device=name, vram=slot)
    least = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    for vram in (least, least + 6 * slot, VRAM):
        model = offload.load(directory, ram="1GiB", nvme=store_root, context=40, batch=2, device=name, vram=vram)
        with model.offload as runtime:
            assert model.device == torch.device(name)
            assert torch.equal(greedy(model, ids.to(name)).cpu(), expected)
            runtime.check()
            stats = runtime.stats()
            assert stats.accelerator is not None
            assert stats.accelerator.hits
        torch.cuda.empty_cache()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("kv_vram", [0, "128KiB", None], ids=["below", "some above", "as much as fits"])
def test_a_cache_in_blocks(
    model_type: str, kv_vram: int | str | None, name: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """The prompt in chunks, which attend to blocks on the GPU; tokens, each device to the blocks in its memory."""
    directory = tiny_checkpoint(model_type)
    ids = prompt(tokens=26, batch=2)
    expected = greedy(reference_model(directory, torch.float32), ids)
    options = {
        "ram": "1GiB", "nvme": store_root, "batch": 2, "device": name, "vram": VRAM, "kv_vram": kv_vram,
        "prefill_chunk": 10,
    }  # fmt: skip
    model = offload.load(directory, context=BLOCKS_CONTEXT, kv_ram=_least_kv_ram(directory, **options), **options)
    with model.offload as runtime:
        assert runtime.plan.kv is not None
        assert torch.equal(greedy(model, ids.to(name)).cpu(), expected)
        runtime.check()
        figures = runtime.stats().kv
        assert figures.paged_steps
        assert bool(figures.accelerated_steps) == (kv_vram != 0)


@pytest.mark.parametrize("format", ["auto", "fp8", "int8", "int4"])
def test_blocks_go_down_while_kernels_write(
    format: str, name: str, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """A quarter of a longer context above: logits are those of blocks in host memory, but for roundings of queries."""
    ids = prompt(tokens=700).to(name)
    found = []
    for kv_vram in (0, "256KiB"):
        directory = tiny_checkpoint("qwen3_moe")
        options = {
            "ram": "1GiB", "nvme": store_root, "device": name, "vram": VRAM, "kv": format, "kv_vram": kv_vram,
            "prefill_chunk": 100,
        }  # fmt: skip
        model = offload.load(directory, context=BLOCKS_CONTEXT, kv_ram=_least_kv_ram(directory, **options), **options)
        with model.offload as runtime, torch.no_grad():
            cache = DynamicCache(config=model.config)
            for part in (*ids.split(100, 1), ids[:, :3], ids[:, :1]):
                logits = model(part, past_key_values=cache).logits[:, -1]
            found.append(logits)
            runtime.check()
            figures = runtime.stats().kv
            assert bool(figures.accelerated_steps) == bool(kv_vram)
            assert figures.blocks_moved or not kv_vram or format != "auto"
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_packed_models(quant: str, name: str, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """The caps change where experts are computed, which changes roundings and no more."""
    outputs = []
    ids = prompt().to(name)
    for vram in ("400MiB", VRAM):
        model = offload.load(
            tiny_checkpoint("qwen3_moe"), ram="1GiB", nvme=store_root, context=40, device=name, vram=vram, quant=quant
        )
        with model.offload, torch.no_grad():
            outputs.append(model(ids).logits.float())
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("captured", [False, True], ids=["stream", "graph"])
def test_the_doorbell(captured: bool, name: str) -> None:
    """Three replays of one graph: the same values ring every time."""
    device = torch.device(name)
    rig = Rig(layers=2)
    nbytes = rig.layout.nbytes
    layout = MailboxLayout(2, 3, rig.layout.hidden, rig.dtype)
    box = Mailbox(layout, mailbox_memory(layout, device))
    home = HostDevice().allocate(len(rig.reader.shard))
    home.bytes()[: len(rig.reader.shard)] = rig.reader.shard
    side = torch.cuda.Stream(device)
    stream = CudaStream(side)
    inputs = [rig.inputs(2, 3, seed=layer) for layer in range(2)]
    there = [[tensor.to(device) for tensor in tensors] for tensors in inputs]
    sums = [torch.empty(2, rig.layout.hidden, device=device) for _ in range(2)]

    def step() -> None:
        for layer, tensors in enumerate(there):
            ring(stream, box, layer, *tensors)
            collect(stream, box, layer, sums[layer])

    with ThreadPool(2) as pool, DoorbellServer(box, rig.layers, pool, lambda *_: None) as server:
        for layer, homes in enumerate(server.homes):
            homes[:] = [home.address + (layer * rig.count + expert) * nbytes for expert in range(rig.count)]
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=side):
                step()
        for _ in range(3):
            server.announce(2)
            if captured:
                with torch.cuda.stream(side):
                    graph.replay()
            else:
                step()
            side.synchronize()
            server.check()
            for layer in range(2):
                rig.assert_close(sums[layer].cpu(), rig.reference(layer, *inputs[layer]))
                sums[layer].fill_(torch.nan)
    rig.close()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_steps_as_graphs(model_type: str, name: str, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    """Experts above, below and on disk; in fp32, in which the last bits decide nothing here."""
    directory = tiny_checkpoint(model_type)
    ids = prompt(batch=2)
    expected = greedy(reference_model(directory, torch.float32), ids)
    model = offload.load(
        directory, ram="1GiB", nvme=store_root, context=40, batch=2, device=name, vram=VRAM, step_graph=True
    )
    with model.offload as runtime:
        for _ in range(2):
            assert torch.equal(greedy(model, ids.to(name)).cpu(), expected)
        runtime.check()
        figures = runtime.stats().graphs
        if model_type == "phimoe":
            # Its rotary embedding copies frequencies from the host in every step.
            assert "cannot capture" in figures.reason and not figures.replayed
            return
        assert figures.reason == ""
        assert figures.replayed > figures.layer_by_layer


def test_a_capture_that_fails_leaves_the_stream_that_was_current(name: str) -> None:
    device = torch.device(name)
    x = torch.ones(4, device=device)
    graph, before = CudaGraph(device), torch.cuda.current_stream(device)
    with pytest.raises(CaptureError):
        graph.capture(lambda: x.sum().item())
    assert torch.cuda.current_stream(device) == before
    graph.capture(lambda: x.add_(1))
    graph.replay()
    assert x.tolist() == [2.0] * 4


@pytest.mark.parametrize("functions", [False, True], ids=["stream values", "host functions"])
def test_words_in_a_graph(functions: bool, name: str) -> None:
    """The same graph twice: a word is waited for that a thread of the host writes, and another is written then."""
    device = torch.device(name)
    words = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    given, taken = (words.data_ptr() + 4 * index for index in range(2))
    x, y = torch.ones(4, device=device), torch.zeros(4, device=device)
    graph = CudaGraph(device, functions=functions)

    def step() -> None:
        graph.wait_value(given, 5)
        y.add_(x)
        graph.write_value(given, 0)
        graph.write_value(taken, 7)

    graph.capture(step)
    for turn in range(1, 3):
        words[1] = 0
        timer = threading.Timer(0.05, lambda: words.__setitem__(0, 5))
        timer.start()
        graph.replay()
        timer.join()
        assert words.tolist() == [0, 7]
        assert y.tolist() == [float(turn)] * 4
