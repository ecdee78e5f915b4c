"""Bundles straight out of a checkpoint: what the expert store is converted from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from formats.bundle import MATRICES, BundleLayout, Component
from formats.packed import PACKED_FORMATS
from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.dtypes import TORCH_DTYPES
from offload.checkpoint.encoded import EncodedMatrix, pick_component, pick_encoded
from offload.checkpoint.experts import MappedExperts
from offload.errors import InvalidArgumentError
from offload.packing import PACKING_VERSION, pack_tensor
from offload.store.source import ExpertGroup
from placement.tensors import ComponentSource, EncodedSpan, TensorSpan

_FORMAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_Kept = dict[TensorSpan, torch.Tensor | EncodedMatrix]


class CheckpointBundleSource:
    """A checkpoint's experts as bundles; implements `offload.store.source.BundleSource`.

    Matrices of packed formats are packed from the stored weights, whatever the model computes in; codes of a quantised
    checkpoint are decoded a matrix at a time, or taken as they are where the format has the same. Filling a bundle
    needs no more memory than one expert in its stored dtype besides the bundle itself, and with `once` the buffer of a
    `DirectReader`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mapped: Sequence[MappedExperts],
        dtype: torch.dtype,
        format: str,
        name: str,
        *,
        once: bool = False,
    ) -> None:
        """Describe the bundles; nothing is read.

        Args:
            checkpoint: must stay open while bundles are filled.
            mapped: the MoE layers, as `map_checkpoint` gives them.
            dtype: of the weights in the running model; stored weights are cast to it as transformers casts them.
            format: of the bundles: packed, or one that holds exactly the values of `dtype`.
            name: what the user called the model.
            once: every expert is read once: keep what is read out of the page cache.

        Raises:
            InvalidArgumentError: the format is unknown or does not hold `dtype`.
        """
        holds = dtype in _FORMAT_DTYPES.values() if format in PACKED_FORMATS else _FORMAT_DTYPES.get(format) is dtype
        if not holds:
            raise InvalidArgumentError(
                f"bundles of format {format!r} from weights in {dtype}: expected one of "
                f"{', '.join(f'{known} for {held}' for known, held in _FORMAT_DTYPES.items())}, or for any "
                f"{', '.join(PACKED_FORMATS)}"
            )
        self._checkpoint = checkpoint
        self._mapped = tuple(mapped)
        self._once = once
        self._name = name
        self._groups = tuple(mapped_group(experts, format) for experts in self._mapped)
        self._identity = _identity(checkpoint.identity, self._groups)

    @property
    def identity(self) -> str:
        """Hex digest of the checkpoint's identity, the layers and their layouts."""
        return self._identity

    @property
    def name(self) -> str:
        """What the user called the model."""
        return self._name

    @property
    def groups(self) -> Sequence[ExpertGroup]:
        """The MoE layers in order."""
        return self._groups

    def fill_bundle(self, group_index: int, expert: int, out: npt.NDArray[np.uint8]) -> None:
        """Write one expert's bundle: its components, cast, and zeros between and behind them.

        Args:
            group_index: index into `groups`.
            expert: expert id in the layer.
            out: uint8 [layout.nbytes], contiguous and writable.

        Raises:
            CheckpointChangedError, StorageError: see `Checkpoint.read`.
            CheckpointError: a weight is not finite and cannot be packed.
        """
        layout = self._groups[group_index].layout
        if out.shape != (layout.nbytes,) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise InvalidArgumentError(f"a bundle of {layout.nbytes} bytes into {out.dtype} {out.shape}")
        sources = self._mapped[group_index].sources[expert]
        # Interleaved gate and up lie in the same bytes, which are read once.
        kept: _Kept = {}
        shared = {source.span for source in sources.values() if _uses(source.span, sources) > 1}
        parts = {}
        end = 0
        for component in layout.components.values():
            out[end : component.offset] = 0
            end = component.offset + component.nbytes
            parts[component.name] = out[component.offset : end]
        out[end:] = 0
        for name, source in sources.items():
            if layout.is_packed and name in MATRICES:
                weights = self._picked(source, kept, shared)
                what = f"{source.span.file}: {name} of expert {expert} of {self._groups[group_index].module}"
                pack_tensor(weights, layout.matrix(name), parts[name], parts[f"{name}_scale"], what)
            else:
                dtype = _FORMAT_DTYPES[layout.bias_element.name]
                self._fill(layout.components[name], source, parts[name], dtype, kept, shared)

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError if a file is no longer what `identity` was taken from."""
        self._checkpoint.check_unchanged()

    def _fill(
        self,
        component: Component,
        source: ComponentSource,
        out: npt.NDArray[np.uint8],
        dtype: torch.dtype,
        kept: _Kept,
        shared: set[TensorSpan],
    ) -> None:
        span = source.span
        as_stored = not isinstance(span, EncodedSpan) and TORCH_DTYPES[span.dtype] is dtype
        if as_stored and span.nbytes == out.nbytes and not source.transposed:
            self._checkpoint.read_into(span, out.data, once=self._once)
            return
        target = torch.from_numpy(out).view(dtype).view(component.shape)
        picked = self._picked(source, kept, shared)
        if isinstance(picked, EncodedMatrix):
            picked.decode_into(target)
        else:
            target.copy_(picked)

    def _picked(self, source: ComponentSource, kept: _Kept, shared: set[TensorSpan]) -> torch.Tensor | EncodedMatrix:
        """The component, of a quantised checkpoint encoded where that is possible."""
        span = source.span
        stored = kept.get(span)
        if stored is None:
            if isinstance(span, EncodedSpan):
                stored = self._checkpoint.read_encoded(span, once=self._once)
            else:
                stored = self._checkpoint.read(span, once=self._once)
        if span in shared:
            kept[span] = stored
        if isinstance(stored, EncodedMatrix):
            return pick_encoded(stored, source)
        return pick_component(stored, source)


def mapped_group(experts: MappedExperts, format: str) -> ExpertGroup:
    """What a store holds of one MoE layer in a format."""
    layout = BundleLayout(experts.hidden, experts.intermediate, format, experts.has_gate, experts.has_bias)
    return ExpertGroup(experts.module, experts.count, layout)


def _uses(span: TensorSpan, sources: dict[str, ComponentSource]) -> int:
    return sum(source.span == span for source in sources.values())


def _identity(checkpoint_identity: str, groups: Sequence[ExpertGroup]) -> str:
    digest = hashlib.blake2b(checkpoint_identity.encode(), digest_size=16)
    for group in groups:
        layout = group.layout
        digest.update(
            f"\0{group.module}\0{group.count}\0{layout.format}\0{layout.hidden}\0{layout.intermediate}"
            f"\0{layout.has_gate}\0{layout.has_bias}".encode()
        )
        if layout.is_packed:
            digest.update(f"\0packing {PACKING_VERSION}\0{layout.nbytes}".encode())
    return digest.hexdigest()
