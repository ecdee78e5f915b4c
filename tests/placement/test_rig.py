"""Changes of a machine, and what they would bring."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.datasheets import GPUS, datasheet
from placement.kv import KvChoice, KvShape
from placement.kv_sparsity import KvSparsity
from placement.rig import Rig, cheapest_doubling, loaded_in_words, sweep, try_change
from placement.routing import Popularity, PopularityHits, residency
from placement.workload import Workload
from tests.placement.machines import machine, model

SPEC = model(layers=3, experts=16, top_k=2, hidden=512, intermediate=512)
WORK = Workload(512, prompt_tokens=64, new_tokens=16)
LITTLE = SPEC.dense_nbytes + 200_000_000


def rig(**parts: str) -> Rig:
    profile = datasheet(**{"drive": "sata", **parts})  # type: ignore[arg-type]
    return Rig(profile, SPEC.dense_nbytes + 60_000_000, profile.gpu.memory_nbytes if profile.gpu else 0)


def test_parts_change_what_they_name() -> None:
    before = rig(gpu="rtx3060")
    assert before.with_part("nvme", "gen5").profile.disk == datasheet(drive="gen5").disk
    bigger = before.with_part("gpu", "rtx5090")
    assert GPUS["rtx3060"].memory_nbytes > before.vram_nbytes
    assert bigger.vram_nbytes > GPUS["rtx4090"].memory_nbytes
    assert bigger.profile.to_gpu == datasheet(gpu="rtx5090").to_gpu
    assert before.with_part("link", "pcie5").profile.gpu == before.profile.gpu
    cpu = before.with_part("cpu", "ddr5-server").profile.cpu
    assert cpu.memory_bytes_per_s > 2 * before.profile.cpu.memory_bytes_per_s
    assert cpu.memory_nbytes == before.profile.cpu.memory_nbytes
    assert Rig(machine(), 1, 0).with_part("nvme", "gen4").profile.provenance.kind == "datasheet"
    with pytest.raises(ValueError, match="unknown part"):
        before.with_part("case", "x")
    with pytest.raises(ValueError, match="needs a GPU"):
        rig().with_part("link", "pcie5")


@pytest.mark.parametrize("name", ["rtx3060", "rtx4090"])
def test_what_is_loaded_is_near_the_fastest_plan_and_keeps_the_budgets(name: str) -> None:
    spec = model(layers=24, experts=64, top_k=4, hidden=2048, intermediate=1408)
    here = replace(rig(gpu=name), ram_nbytes=24 << 30)
    best, loaded = here.plan(spec, WORK), here.loaded(spec, WORK)
    assert best.vram is not None and loaded.vram is not None
    assert best.prediction is not None and loaded.prediction is not None
    assert loaded.vram.dense_layers == tuple(range(24))
    assert loaded.vram.use.total_nbytes <= here.vram_nbytes
    assert loaded.peak_ram_nbytes <= here.ram_nbytes
    assert abs(best.vram.slots - loaded.vram.slots) <= 4
    new = WORK.new_tokens
    assert loaded.prediction.request_s(new) == pytest.approx(best.prediction.request_s(new), rel=0.02)
    assert "all dense layers" in loaded_in_words(here, spec, WORK, None)


def test_dense_layers_that_stream_are_in_what_is_loaded() -> None:
    spec = model(layers=24, experts=64, top_k=4, hidden=2048, intermediate=1408)
    here = replace(rig(gpu="rtx3060"), ram_nbytes=24 << 30)
    dense = sum(layer.dense_nbytes for layer in spec.layers)
    whole = here.loaded(spec, WORK)
    assert whole.vram is not None and whole.prediction is not None
    small = here.with_memory(vram=whole.vram.use.activation_nbytes + dense // 2)
    plan = small.loaded(spec, WORK)
    assert plan.vram is not None and plan.prediction is not None
    assert plan.vram.window_layers > 0
    assert plan.prediction.decode.seconds > whole.prediction.decode.seconds
    assert "dense layers streaming through it" in loaded_in_words(small, spec, WORK, None)
    assert loaded_in_words(small.with_memory(vram=1), spec, WORK, None).startswith("does not fit")


def test_the_first_change_that_doubles() -> None:
    here = rig()
    plan = here.plan(SPEC, WORK)
    assert plan.prediction is not None
    assert plan.prediction.decode.binds == "disk"
    doubling, best = cheapest_doubling(here, plan, SPEC)
    assert doubling is best
    assert best.name == "16 GiB more RAM"
    assert best.decode_tokens_per_s >= 2 * plan.prediction.decode.tokens_per_s


def test_what_nothing_doubles_gets_the_best() -> None:
    profile = datasheet(gpu="rtx5090", cpu="ddr5-server", drive="gen5")
    here = Rig(profile, 1 << 40, 1 << 40)
    plan = here.plan(SPEC, WORK)
    doubling, best = cheapest_doubling(here, plan, SPEC)
    assert doubling is None
    assert best.plan is not None


def test_what_does_not_fit_has_no_speed() -> None:
    change = try_change("none", Rig(datasheet(), 1, 0), SPEC, WORK, None)
    assert (change.plan, change.decode_tokens_per_s) == (None, 0.0)


def test_curves_rise_with_memory_and_fall_with_context() -> None:
    here = Rig(datasheet(gpu="rtx3060", drive="sata"), LITTLE, 4 << 30)
    found = sweep(here, here.plan(SPEC, WORK), SPEC, points=4)
    for name in ("ram", "vram"):
        speeds = [speed for _, speed in found[name]]
        assert speeds == sorted(speeds)
    contexts = [speed for _, speed in found["context"]]
    assert contexts[0] >= contexts[-1]
    assert not sweep(rig(), rig().plan(SPEC, WORK), SPEC, points=2)["vram"]


def test_curves_know_the_format_of_the_kv_cache() -> None:
    spec = replace(SPEC, kv_nbytes_per_token=3 * 4096, kv_shapes=(KvShape(8, 128, 128),) * 3)
    here = replace(rig(), ram_nbytes=1 << 33, kv=KvChoice("int8", sparsity=KvSparsity("top-k", 0.05)))
    plan = here.plan(spec, WORK)
    assert plan.kv is not None and (plan.kv.format, plan.kv.sparsity) == ("int8", "top-k:0.05")
    assert here.with_part("nvme", "gen5").kv == here.with_part("gpu", "rtx3060").kv == here.kv
    longest = [sweep(one, plan, spec, points=2)["context"][-1][1] for one in (here, replace(here, kv=None))]
    assert longest[0] > longest[1]


@pytest.mark.parametrize("skew", [0.0, 0.9])
def test_residents_fill_the_slots(skew: float) -> None:
    layers = [(16, 2), (32, 4)]
    for slots in (5.0, 20.0, 40.0):
        shares = residency(layers, Popularity(skew), slots)
        assert sum(share.sum() for share in shares) == pytest.approx(slots, rel=1e-3)
        assert all((share[:-1] >= share[1:] - 1e-12).all() for share in shares)
    assert all((share == 1).all() for share in residency(layers, Popularity(skew), 48))
    assert PopularityHits(layers, 1, Popularity(skew)).experts == 48
