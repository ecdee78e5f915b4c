"""`offload.load(device="cuda")` from the door to tokens, over a driver that host memory plays, kernels interpreted."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import offload
from offload import assembly
from offload.devices import cuda_driver
from offload.devices.cuda import CudaDevice
from offload.devices.pinned import PinnedHostDevice
from offload.errors import DoesNotFitError, InvalidArgumentError, SlowDeviceWarning, SlowKvWarning
from offload.kv import attention
from offload.kv.pieces import attend_in_pieces
from placement import kv
from placement.kv_settings import PIECES_NBYTES
from tests.conftest import TinyCheckpoint
from tests.dense_models import write_dense
from tests.devices.fake_cuda import FakeCudaDriver
from tests.hf.reference import greedy, prompt, reference_model
from tests.kv.tables import SETTINGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/devices/test_on_gpu.py has the real one")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeCudaDriver:
    driver = FakeCudaDriver(total_nbytes=512 << 20)
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda _name: driver)
    return driver


def _load(directory: Path, store_root: Path, **options: object) -> torch.nn.Module:
    settings = {"ram": "1GiB", "context": 40} | options
    return offload.load(directory, nvme=store_root, device="cuda:1", **settings)  # type: ignore[return-value,call-overload]


def _least_vram(directory: Path, store_root: Path) -> int:
    with pytest.raises(DoesNotFitError, match=r"bytes of VRAM: .* window of dense layers") as caught:
        _load(directory, store_root, vram="1MiB")
    return int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))


def _least_kv_ram(directory: Path, store_root: Path) -> int:
    with pytest.raises(InvalidArgumentError, match="two segments to read into") as caught:
        _load(directory, store_root, batch=2, kv_ram=1)
    return int(str(caught.value).split("take ")[1].split(" ")[0].replace(",", ""))


def test_tokens_equal_transformers_at_any_cap(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """One family and few tokens: kernels take their time in the interpreter."""
    directory = tiny_checkpoint("mixtral")
    ids = prompt(tokens=4)
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=2)
    least = _least_vram(directory, store_root)
    for vram, window in ((least, 2), (None, 0)):
        model = _load(directory, store_root, vram=vram)
        with model.offload as runtime:
            plan = runtime.plan
            assert plan.vram.window_layers == window
            assert plan.vram.use.kv_nbytes
            assert plan.vram.use.total_nbytes <= driver.limit_nbytes == plan.vram.budget_nbytes
            assert vram is None or plan.vram.budget_nbytes == vram
            assert torch.equal(greedy(model, ids, new_tokens=2), expected)
            runtime.check()
            assert runtime.stats().accelerator.hits
            assert driver.pinned


def test_a_cache_in_blocks_lies_in_host_memory(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `kv_vram=0`: the prompt in two chunks, the second of which attends to blocks with its products, then tokens,
    by the CPU.
    """
    # As for tensors that are not on the CPU.
    monkeypatch.setattr(attention, "_flash", attend_in_pieces)
    directory = tiny_checkpoint("qwen3_moe")
    ids = prompt(tokens=20)
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=2)
    model = _load(directory, store_root, context=9000, kv_ram="3MiB", kv_vram=0, prefill_chunk=10)
    with model.offload as runtime:
        plan = runtime.plan
        assert plan.kv is not None
        assert (plan.kv_tier, plan.vram.use.kv_nbytes) == ("ram", 0)
        assert torch.equal(greedy(model, ids, new_tokens=2), expected)
        runtime.check()
        figures = runtime.stats().kv
        assert figures.paged_steps
        assert not figures.gathered_steps
        assert not figures.accelerated_steps


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_tokens_with_the_newest_blocks_in_vram(
    model_type: str,
    driver: FakeCudaDriver,
    tiny_checkpoint: TinyCheckpoint,
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quarter of the context there, the rest in RAM and on disk; grouped heads, latents, and sinks."""
    monkeypatch.setattr(attention, "_flash", attend_in_pieces)
    monkeypatch.setattr(kv, "SETTINGS", SETTINGS)
    directory, ids = tiny_checkpoint(model_type), prompt(batch=2, tokens=70)
    padded = torch.ones_like(ids)
    padded[0, :25] = 0
    options = {"attention_mask": padded, "new_tokens": 3}
    expected = greedy(reference_model(directory, torch.float32), ids, **options)
    least = _least_kv_ram(directory, store_root)
    quarter = 2 * 80 * offload.plan(directory, context=80, batch=2, kv_ram=least).kv.nbytes_per_token // 4
    model = _load(directory, store_root, context=80, batch=2, kv_ram=least, kv_vram=quarter, prefill_chunk=40)
    with model.offload as runtime:
        plan = runtime.plan
        assert plan.kv.vram_nbytes == plan.vram.use.kv_nbytes > 0
        assert plan.vram.use.total_nbytes <= driver.limit_nbytes
        driver.followed.clear()
        assert torch.equal(greedy(model, ids, **options), expected)
        runtime.check()
        figures = runtime.stats().kv
        assert figures.gathered == (), figures.gathered
        assert figures.accelerated_steps
        assert figures.blocks_moved
        assert figures.vram_nbytes
        assert figures.ram_nbytes
        assert driver.followed, "copies down did not wait for kernels"


def test_packed_blocks_in_vram(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of packed blocks in RAM, but for what roundings of the queries there change."""
    monkeypatch.setattr(kv, "SETTINGS", replace(SETTINGS, recent_tokens=16))
    directory, ids = tiny_checkpoint("qwen3_moe"), prompt(tokens=53)
    found = []
    for vram in (0, "2MiB"):
        model = _load(directory, store_root, context=400, kv="int8", kv_vram=vram, prefill_chunk=300)
        cache = DynamicCache(config=model.config)
        with model.offload as runtime, torch.no_grad():
            for part in (ids, ids[:, :2], ids[:, :1]):
                found.append(model(part, past_key_values=cache).logits)
            runtime.check()
            assert bool(runtime.stats().kv.accelerated_steps) == bool(vram)
    for below, above in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(above, below, rtol=1e-3, atol=1e-3)


def test_a_cache_too_large_for_vram_goes_into_blocks(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    long = {"ram": "4GiB", "context": 1_000_000, "prefill_chunk": 8}
    with pytest.warns(SlowKvWarning, match=r"the newest \d+ tokens in VRAM, the others in RAM and on disk"):
        model = _load(directory, store_root, **long)
    with model.offload as runtime:
        plan = runtime.plan
        assert plan.kv is not None
        assert plan.vram.use.kv_nbytes == plan.kv.vram_nbytes > 0
        assert plan.vram.use.activation_nbytes > PIECES_NBYTES
    with pytest.raises(DoesNotFitError, match="KV cache"):
        _load(directory, store_root, **long, vram="1MiB")


def test_a_cache_in_vram_leaves_ram_to_experts(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    """RAM that would hold the cache has slots; a long sequence takes none of them."""
    directory = tiny_checkpoint("mixtral")
    below = offload.plan(directory, ram="1GiB", context=4000)
    ram = below.peak_ram_nbytes - 4 * below.slot_nbytes
    model = _load(directory, store_root, ram=ram, context=4000)
    with model.offload as runtime:
        plan = runtime.plan
        assert (plan.kv_tier, plan.ram.kv_nbytes) == ("vram", 0)
        assert plan.ram_slots > offload.plan(directory, ram=ram, context=4000).ram_slots
        runtime.make_room(1, 1, 3900, all_logits=False)
        assert runtime.tier.table.usable_slots == plan.ram_slots


def test_refused_pinning_is_said(driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path) -> None:
    directory = tiny_checkpoint("mixtral")
    driver.pinnable_nbytes = 0
    with pytest.warns(SlowDeviceWarning, match="refused to pin"):
        model = _load(directory, store_root)
    with model.offload as runtime:
        assert isinstance(runtime.device, PinnedHostDevice)
        assert runtime.device.refused_nbytes
        runtime.check()


def test_out_of_memory_while_loading_leaves_nothing_pinned(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has less than it said: the first slab after the link was measured is refused."""
    allocate = driver.allocate

    def fail(nbytes: int) -> torch.Tensor:
        if driver.copies:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(nbytes)

    monkeypatch.setattr(driver, "allocate", fail)
    with pytest.raises(DoesNotFitError, match="in one piece"):
        _load(tiny_checkpoint("mixtral"), store_root)
    gc.collect()
    assert not driver.pinned
    assert driver.limit_nbytes == driver.total_nbytes


def test_out_of_memory_outside_of_experts_leaves_the_next_pass_more(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output layer, of a prompt and of a token; the last slab stays, whatever fails."""
    directory = tiny_checkpoint("mixtral")
    ids = prompt(tokens=4)
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=2)
    monkeypatch.setattr(CudaDevice, "slab_nbytes", 2 * offload.plan(directory, ram="1GiB", context=40).slot_nbytes)
    model, failing = _load(directory, store_root), [0]
    head = model.lm_head.forward

    def full(x: torch.Tensor) -> torch.Tensor:
        failing[0] -= 1
        if failing[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return head(x)

    monkeypatch.setattr(model.lm_head, "forward", full)
    with model.offload as runtime:
        table = runtime.accelerated.tiers.above.table
        slots = table.usable_slots
        for passes in (1, 2):
            failing[0] = passes
            with (
                pytest.warns(SlowDeviceWarning, match="2 expert slots were given up"),
                pytest.raises(torch.OutOfMemoryError),
            ):
                greedy(model, ids, new_tokens=2)
            assert table.usable_slots == slots - 2 * passes
            runtime.check()
        assert torch.equal(greedy(model, ids, new_tokens=2), expected)
        while table.usable_slots > 2:
            with pytest.warns(SlowDeviceWarning, match="were given up"):
                runtime.pass_failed(torch.OutOfMemoryError("out of memory"))
        runtime.pass_failed(torch.OutOfMemoryError("out of memory"))
        runtime.pass_failed(ValueError("no memory"))
        assert table.usable_slots == 2
        assert torch.equal(greedy(model, ids, new_tokens=2), expected)
        runtime.check()


@pytest.mark.parametrize("module", ["compile_ahead", "_layers", "Runtime", "_store_and_model", "adopt"])
def test_a_model_that_is_not_made_leaves_torch_the_card(
    module: str, driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        assert driver.limit_nbytes < driver.total_nbytes
        raise DoesNotFitError("told to")

    monkeypatch.setattr(assembly, module, fail)
    with pytest.raises(DoesNotFitError, match="told to"):
        _load(tiny_checkpoint("mixtral"), store_root, vram="300MiB")
    assert driver.limit_nbytes == driver.total_nbytes


def test_two_models_on_one_card_keep_their_limits(
    driver: FakeCudaDriver, tiny_checkpoint: TinyCheckpoint, store_root: Path
) -> None:
    first, second = (_load(tiny_checkpoint("mixtral"), store_root, vram=vram) for vram in ("300MiB", "280MiB"))
    assert driver.limit_nbytes == 580 << 20
    first.offload.close()
    assert driver.limit_nbytes == 280 << 20
    second.offload.close()
    assert driver.limit_nbytes == driver.total_nbytes


def test_a_dense_model_streams_or_lies_above(driver: FakeCudaDriver, tmp_path: Path) -> None:
    directory = write_dense(tmp_path / "llama", "llama", num_hidden_layers=6)
    ids = prompt(tokens=6)
    expected = greedy(reference_model(directory, torch.float32), ids, new_tokens=4)
    least = _least_vram(directory, tmp_path)
    for vram, window in ((least, 2), (None, 0)):
        model = _load(directory, tmp_path, vram=vram)
        with model.offload as runtime:
            assert (runtime.plan.vram.window_layers, runtime.plan.vram.slots) == (window, 0)
            assert torch.equal(greedy(model, ids, new_tokens=4), expected)
            runtime.check()
            assert (runtime.stats().accelerator.dense_bytes_copied > 0) == (window > 0)
            assert driver.pinned
