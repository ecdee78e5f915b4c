"""What the user asked for, checked at the door."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from offload.devices.link import Link, parse_link
from offload.errors import InvalidArgumentError
from offload.quantisation import Quantisation, make_quantisation
from offload.sizes import parse_size
from placement.kv import KV_CHOICES, KvChoice
from placement.kv_sparsity import SPARSITY_METHODS, KvSparsity
from prefetch.policies.names import POLICIES
from prefetch.predictors.names import SOURCES
from prefetch.scheduler.names import SCHEDULERS
from profiler.memory import available_ram_nbytes

if TYPE_CHECKING:
    from prefetch.policies.base import CachePolicy
    from prefetch.predictors.base import LayerPredictor
    from prefetch.scheduler.base import StepScheduler

_Part = TypeVar("_Part")

DEFAULT_CONTEXT_TOKENS = 4096
PREFILL_CHUNK_TOKENS = 1024

FUSED_KINDS = ("attention", "decoder", "kv_cache", "linear", "rms_norm", "rotary")
"""What `offload.hf.fused` computes with kernels of its own."""

DEFAULT_LINK = "25GB/s"
"""What PCIe 4.0 x16 carries of its nominal 31.5 GB/s."""

_RAM_KEPT_FREE = 0.1

_CUDA = re.compile(r"cuda(:\d+)?")


@dataclass(frozen=True)
class AcceleratorRequest:
    """An accelerator: a GPU, or one that host memory plays.

    Attributes:
        device: "host", "cuda" or "cuda:N".
        vram_nbytes: bytes of its memory that may be used; of a GPU None for what is free. The host's lie beside `ram`.
        link: how fast bytes get to the one that the host plays; None for a GPU, whose link is measured.
    """

    device: str
    vram_nbytes: int | None
    link: Link | None


@dataclass(frozen=True)
class Request:
    """Budgets and workload, resolved.

    Attributes:
        ram_nbytes: bound on what the runtime holds in host memory.
        store_root: directory of expert stores.
        context_tokens: longest sequence, None for the default.
        batch: sequences at once.
        prefill_chunk_tokens: see `Workload`; None for what the planner chooses.
        fused: names of FUSED_KINDS.
        quantisation: packed formats.
        policy: the cache policy's name, or the policy.
        prefetch: "auto", "on" or "off".
        scheduler: the step scheduler's name, or the scheduler.
        predictor: "auto", the one source of predictions, or the predictor.
        accelerator: None for the CPU alone.
        kv: format, bound and sparsity of the KV cache.
        prefixes_nbytes: bound on saved prefixes, None where none are kept.
        step_graph: replay decode steps as graphs.
    """

    ram_nbytes: int
    store_root: Path
    context_tokens: int | None
    batch: int
    prefill_chunk_tokens: int | None
    fused: frozenset[str]
    quantisation: Quantisation
    policy: str | CachePolicy
    prefetch: str
    scheduler: str | StepScheduler = "auto"
    predictor: str | LayerPredictor = "auto"
    accelerator: AcceleratorRequest | None = None
    kv: KvChoice = field(default_factory=KvChoice)
    prefixes_nbytes: int | None = None
    step_graph: bool = False


def make_request(
    *,
    ram: int | str | None,
    nvme: str | os.PathLike[str] | None,
    context: int | None,
    batch: int,
    prefill_chunk: int | str,
    max_memory: Mapping[str | int, int | str] | None,
    fused: bool | Iterable[str] = True,
    quant: str | Mapping[str, str | None] | None = None,
    policy: str | CachePolicy = "auto",
    prefetch: bool | str = False,
    scheduler: str | StepScheduler = "auto",
    predictor: str | LayerPredictor = "auto",
    device: str | None = None,
    vram: int | str | None = None,
    link: str | Link | None = None,
    kv: str = "auto",
    kv_ram: int | str | None = None,
    kv_vram: int | str | None = None,
    kv_sparsity: str | None = None,
    prefix_cache: int | str | None = None,
    step_graph: bool = False,
) -> Request:
    """Check and resolve a user's arguments.

    Args:
        ram: size, or None for what is available now less a tenth.
        nvme: directory, "~" allowed, or None for the cache directory.
        context: tokens.
        batch: sequences.
        prefill_chunk: tokens, or "auto" for what this machine is predicted to do best with.
        max_memory: accelerate's spelling: {"cpu": size}.
        fused: names of FUSED_KINDS, True for all and False for none.
        quant: see `make_quantisation`.
        policy: "auto", one of POLICIES, or a `CachePolicy`.
        prefetch: "auto" for as long as it pays, True or "on" for always, False or "off" for never.
        scheduler: one of SCHEDULERS, or a `StepScheduler`.
        predictor: "auto", one of SOURCES, or a `LayerPredictor`; with `prefetch`.
        device: "cuda" or "cuda:N" for a GPU; "host", or None for it.
        vram: of a GPU what may be used of its memory, None for all that is free; otherwise the size of the memory of an
            accelerator that the host plays, None for none.
        link: bytes per second to it, None for DEFAULT_LINK.
        kv: one of KV_CHOICES.
        kv_ram: bound on the KV cache's memory, None for what the plan gives it.
        kv_vram: bound on the memory of its newest blocks in the memory of `vram`, None for what the plan gives them, 0
            for none.
        kv_sparsity: one of SPARSITY_METHODS and a share, for which the KV cache lies in blocks; None for all of it.
        prefix_cache: bound on the bytes of saved prefixes, for which the KV cache lies in blocks; None for none.
        step_graph: replay decode steps as graphs, with an accelerator.

    Raises:
        InvalidArgumentError: naming the argument, what it may be and what it was.
    """
    if max_memory is not None:
        ram_nbytes = _from_max_memory(max_memory, ram)
    elif ram is None:
        ram_nbytes = int(available_ram_nbytes() * (1 - _RAM_KEPT_FREE))
    else:
        ram_nbytes = parse_size(ram, "ram")
    if context is not None:
        _check_count("context", context)
    _check_count("batch", batch)
    accelerator = _accelerator(device, vram, link)
    choice = kv_choice(kv, kv_ram, kv_sparsity, saved=prefix_cache is not None)
    return Request(
        ram_nbytes,
        store_root(nvme),
        context,
        batch,
        _chunk(prefill_chunk),
        _fused_kinds(fused),
        make_quantisation(quant),
        _policy(policy),
        _prefetch(prefetch),
        _scheduler(scheduler),
        _predictor(predictor, prefetch),
        accelerator,
        _kv_above(choice, kv_vram, accelerator),
        None if prefix_cache is None else parse_size(prefix_cache, "prefix_cache"),
        _step_graph(step_graph, accelerator, prefetch, scheduler),
    )


def store_root(nvme: str | os.PathLike[str] | None) -> Path:
    """The directory of expert stores: the one given, else $XDG_CACHE_HOME/offload, else ~/.cache/offload.

    As the XDG specification wants it, XDG_CACHE_HOME counts only where it is absolute.

    Raises:
        InvalidArgumentError: `nvme` is not a path, or there is no home directory that "~" could mean.
    """
    try:
        if nvme is not None:
            path = os.fspath(nvme)
            if not isinstance(path, str) or not path:
                raise TypeError
            return Path(path).expanduser()
        cache = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
        return (cache if cache.is_absolute() else Path("~/.cache").expanduser()) / "offload"
    except TypeError:
        raise InvalidArgumentError(f"nvme={nvme!r}: expected a directory for the expert store") from None
    except RuntimeError as error:
        raise InvalidArgumentError(f"nvme={nvme!r}: {error}; give the directory's full path") from error


def _accelerator(device: object, vram: int | str | None, link: str | Link | None) -> AcceleratorRequest | None:
    if isinstance(device, str) and _CUDA.fullmatch(device):
        if link is not None:
            raise InvalidArgumentError(f'link={link!r}: goes with device="host"; a GPU\'s is measured')
        return AcceleratorRequest(device, None if vram is None else parse_size(vram, "vram"), None)
    if device not in (None, "host"):
        raise InvalidArgumentError(f'device={device!r}: expected "host", "cuda" or "cuda:N"')
    if vram is None:
        if link is not None:
            raise InvalidArgumentError(f"link={link!r}: goes with vram=, the memory at its other end")
        return None
    if device is None:
        raise InvalidArgumentError(
            f'vram={vram!r}: goes with device="cuda", or with device="host", whose memory plays an accelerator\'s'
        )
    return AcceleratorRequest("host", parse_size(vram, "vram"), parse_link(DEFAULT_LINK if link is None else link))


def _step_graph(
    step_graph: object, accelerator: AcceleratorRequest | None, prefetch: bool | str, scheduler: object
) -> bool:
    if not isinstance(step_graph, bool):
        raise InvalidArgumentError(f"step_graph={step_graph!r}: expected True or False")
    if step_graph and accelerator is None:
        raise InvalidArgumentError('step_graph=True: goes with device="cuda", or with device="host" and vram=')
    if step_graph and _prefetch(prefetch) != "off":
        raise InvalidArgumentError(
            f"step_graph=True and prefetch={prefetch!r}: a graph has no moment between layers at which experts could "
            "be read ahead; give one of them"
        )
    if step_graph and scheduler != "auto":
        raise InvalidArgumentError(
            f"step_graph=True and scheduler={scheduler!r}: a graph computes experts where they are and schedules none "
            "of a step; give one of them"
        )
    return step_graph


def kv_choice(format: object, ram: int | str | None, sparsity: object, *, saved: bool = False) -> KvChoice:
    """What `kv=`, `kv_ram=` and `kv_sparsity=` ask for; saved: whether prefixes are to be saved.

    Raises:
        InvalidArgumentError: one of them means nothing, or they do not go together.
    """
    if not isinstance(format, str) or format not in KV_CHOICES:
        raise InvalidArgumentError(f"kv={format!r}: expected one of {', '.join(KV_CHOICES)}")
    chosen = None if sparsity is None else parse_sparsity(sparsity)
    if chosen is not None and chosen.evicts and saved:
        raise InvalidArgumentError(
            f"kv_sparsity={sparsity!r} and prefix_cache=: {chosen.method} evicts tokens that a saved prefix must hold; "
            'use kv_sparsity="top-k:..." with it'
        )
    nbytes = None if ram is None else parse_size(ram, "kv_ram")
    return KvChoice(format, nbytes, saved or chosen is not None, chosen)


def _kv_above(choice: KvChoice, vram: int | str | None, accelerator: AcceleratorRequest | None) -> KvChoice:
    """The choice with what `kv_vram=` asks for.

    Raises:
        InvalidArgumentError: there is no such memory, or what is in it cannot be attended to in part.
    """
    if vram is None:
        return replace(choice, vram_nbytes=None if accelerator is not None and choice.sparsity is None else 0)
    # Of sizes this one alone may be nothing.
    nbytes = 0 if vram == 0 and vram is not False else parse_size(vram, "kv_vram")
    if accelerator is None:
        raise InvalidArgumentError(f'kv_vram={vram!r}: goes with device="cuda", or with device="host" and vram=')
    if choice.sparsity is not None and nbytes:
        raise InvalidArgumentError(
            f'kv_vram={vram!r} and kv_sparsity="{choice.sparsity}": an accelerator attends to all blocks that it '
            "holds; give one of them"
        )
    return replace(choice, blocks=choice.blocks or nbytes > 0, vram_nbytes=nbytes)


def parse_sparsity(value: object) -> KvSparsity:
    """A method and a share, as "top-k:0.05".

    Raises:
        InvalidArgumentError: saying what it may be and what it was.
    """
    expected = InvalidArgumentError(
        f"kv_sparsity={value!r}: expected one of {', '.join(SPARSITY_METHODS)} and a share above 0 and at most 1, such "
        'as "top-k:0.05"'
    )
    if not isinstance(value, str):
        raise expected
    try:
        found = KvSparsity.parse(value)
    except ValueError:
        raise expected from None
    if found.method not in SPARSITY_METHODS or not 0 < found.share <= 1:
        raise expected
    return found


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidArgumentError(f"{name}={value!r}: expected a positive whole number")


def _chunk(tokens: int | str) -> int | None:
    if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0:
        return tokens
    if tokens == "auto":
        return None
    raise InvalidArgumentError(f"prefill_chunk={tokens!r}: expected a positive whole number, or auto")


def _fused_kinds(fused: object) -> frozenset[str]:
    if isinstance(fused, bool):
        return frozenset(FUSED_KINDS if fused else ())
    named = list(fused) if isinstance(fused, Iterable) and not isinstance(fused, str) else None
    if named is None or not all(name in FUSED_KINDS for name in named):
        raise InvalidArgumentError(f"fused={fused!r}: expected True, False or some of {', '.join(FUSED_KINDS)}")
    return frozenset(named)


def _part(argument: str, value: _Part, names: Sequence[str], module: str, kind: str) -> _Part:
    """A name, or an object of a class, whose module is loaded only where it is an object."""
    known = value in names if isinstance(value, str) else isinstance(value, getattr(import_module(module), kind))
    if not known:
        raise InvalidArgumentError(f"{argument}={value!r}: expected {', '.join(names)} or a {kind}")
    return value


def _policy(policy: str | CachePolicy) -> str | CachePolicy:
    return _part("policy", policy, ("auto", *POLICIES), "prefetch.policies.base", "CachePolicy")


def _prefetch(prefetch: bool | str) -> str:
    named = {True: "on", False: "off", "auto": "auto", "on": "on", "off": "off"}
    # 1 == True, and a list is no key.
    if not isinstance(prefetch, (bool, str)) or prefetch not in named:
        raise InvalidArgumentError(f"prefetch={prefetch!r}: expected True, False, auto, on or off")
    return named[prefetch]


def _scheduler(scheduler: str | StepScheduler) -> str | StepScheduler:
    return _part("scheduler", scheduler, SCHEDULERS, "prefetch.scheduler.base", "StepScheduler")


def _predictor(predictor: str | LayerPredictor, prefetch: bool | str) -> str | LayerPredictor:
    _part("predictor", predictor, ("auto", *SOURCES), "prefetch.predictors.base", "LayerPredictor")
    if predictor != "auto" and _prefetch(prefetch) == "off":
        raise InvalidArgumentError(
            f"predictor={predictor!r} and prefetch={prefetch!r}: nothing asks a predictor while nothing is read ahead; "
            'give prefetch="auto" or True with it'
        )
    return predictor


def _from_max_memory(max_memory: object, ram: int | str | None) -> int:
    if ram is not None:
        raise InvalidArgumentError("ram= and max_memory= both given: max_memory is another spelling, use one")
    if not isinstance(max_memory, Mapping) or set(max_memory) != {"cpu"}:
        raise InvalidArgumentError(f'max_memory={max_memory!r}: this version knows {{"cpu": size}} and nothing else')
    return parse_size(max_memory["cpu"], 'max_memory["cpu"]')
