"""Experts of a model that is already in memory, as a source for the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from transformers import PreTrainedModel

from formats.bundle import MATRICES, BundleLayout
from offload.checkpoint.moe_modules import refuse_foreign_experts
from offload.errors import UnsupportedModelError
from offload.hf.dtypes import DTYPE_OF_FORMAT, FORMAT_OF_DTYPE
from offload.hf.experts_interface import experts_modules
from offload.packing import PACKING_VERSION, pack_tensor
from offload.store.source import ExpertGroup


class ModelBundleSource:
    """The experts of a transformers model with its weights loaded. Reads its parameters, changes nothing."""

    def __init__(self, model: PreTrainedModel, name: str, format: str | None = None) -> None:
        """Look at the experts' shapes and digest their weights; of a dense model all of its weights.

        Args:
            model: with its weights.
            name: what the user called it.
            format: packed format of the bundles; None for the parameters' own dtype.

        Raises:
            UnsupportedModelError: experts of a kind that bundles do not hold.
        """
        refuse_foreign_experts(model)
        self.name = name
        self._modules = dict(experts_modules(model))
        self.groups: Sequence[ExpertGroup] = tuple(
            expert_group(path, module, format) for path, module in self._modules.items()
        )
        digest = xxhash.xxh3_128()
        if format is not None:
            digest.update(f"packing {PACKING_VERSION}".encode())
        for path, module in (self._modules or {"": model}).items():
            for key, parameter in module.named_parameters():
                digest.update(f"{path}.{key} {parameter.dtype} {tuple(parameter.shape)}".encode())
                digest.update(_memory(parameter.detach().contiguous()).data)
        self.identity = digest.hexdigest()

    def fill_bundle(self, group_index: int, expert: int, out: npt.NDArray[np.uint8]) -> None:
        """See `BundleSource.fill_bundle`."""
        group = self.groups[group_index]
        parts = _components(self._modules[group.module], expert)
        out[:] = 0
        layout = group.layout
        places = {
            name: out[component.offset : component.offset + component.nbytes]
            for name, component in layout.components.items()
        }
        for name, part in parts.items():
            if layout.is_packed and name in MATRICES:
                what = f"{name} of expert {expert} of {group.module}"
                pack_tensor(part, layout.matrix(name), places[name], places[f"{name}_scale"], what)
            else:
                places[name][:] = _memory(part.to(DTYPE_OF_FORMAT[layout.bias_element.name]).contiguous())

    def check_unchanged(self) -> None:
        """Memory of this process: nobody else changes it."""


def _memory(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.view(torch.uint8).reshape(-1).numpy()


def expert_group(name: str, module: torch.nn.Module, format: str | None) -> ExpertGroup:
    """The layer's experts by the shapes of their parameters, which may be on meta.

    Args:
        name: path of the experts module.
        module: with its parameters.
        format: packed format of the bundles; None for the parameters' own dtype.

    Raises:
        UnsupportedModelError: experts of a kind that bundles do not hold.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has a norm inside the experts: not supported yet"
        )
    down = module.down_proj
    if not isinstance(down, torch.Tensor) or down.dtype not in FORMAT_OF_DTYPE:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) keeps its experts in a form that is not supported"
        )
    count, rows, columns = down.shape
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    layout = BundleLayout(
        hidden, intermediate, format or FORMAT_OF_DTYPE[down.dtype], bool(module.has_gate), bool(module.has_bias)
    )
    return ExpertGroup(name, count, layout)


def _components(module: torch.nn.Module, expert: int) -> dict[str, torch.Tensor]:
    """Gate, up and down of one expert, rows are outputs, whatever the module's own orientation."""
    into_name = "gate_up_proj" if module.has_gate else "up_proj"
    parts: dict[str, torch.Tensor] = {}
    for suffix in ("", "_bias") if module.has_bias else ("",):
        into = module.get_parameter(f"{into_name}{suffix}").detach()[expert]
        down = module.get_parameter(f"down_proj{suffix}").detach()[expert]
        if module.is_transposed and not suffix:
            into, down = into.mT, down.mT
        parts[f"down{suffix}"] = down
        if not module.has_gate:
            parts[f"up{suffix}"] = into
        elif module.is_concatenated:
            parts[f"gate{suffix}"], parts[f"up{suffix}"] = into.chunk(2)
        else:
            parts[f"gate{suffix}"], parts[f"up{suffix}"] = into[0::2], into[1::2]
    return parts
