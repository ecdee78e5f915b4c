"""A linear layer whose weights are packed."""

from __future__ import annotations

import torch
from torch import nn

from cpu_kernels.packed_linear import PackedWeights, packed_linear
from formats.packed import MatrixLayout
from offload.checkpoint.encoded import EncodedMatrix
from offload.devices.host_threads import kernel_pool
from offload.packing import pack_tensor

_SCRATCH_NBYTES = 16 << 20
"""Sums are fp32 before they are rounded to the dtype of the output: so many bytes of them at once, or one token."""


class QuantisedLinear(nn.Module):
    """y = q(x) W^T + b with W in a packed format and x rounded to int8 in groups of 64; see `packed_linear`.

    Attributes:
        in_features: K.
        out_features: N.
        layout: of the packed weights.
        codes: uint8 [layout.codes_nbytes].
        scales: uint8 [layout.scales_nbytes].
        bias: fp32 [N] or None.
        weights: codes and scales as kernels take them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | EncodedMatrix,
        bias: torch.Tensor | None,
        format: str,
        name: str,
        memory: torch.Tensor | None = None,
    ) -> None:
        """Pack a layer's weights.

        Args:
            weight: [N, K] on the CPU, or encoded.
            bias: [N] or None.
            format: a key of PACKED_FORMATS.
            name: names the layer in errors.
            memory: uint8 [layout.nbytes], where codes and then scales go; None: new memory.

        Raises:
            CheckpointError: a weight is not finite.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.layout = MatrixLayout(self.out_features, self.in_features, format)
        if memory is None:
            memory = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        codes, scales = memory.split([self.layout.codes_nbytes, self.layout.scales_nbytes])
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        # A bias is added in fp32: rounded to the model's dtype it would be no smaller to speak of.
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone(), persistent=False)
        pack_tensor(weight, self.layout, self.codes.numpy(), self.scales.numpy(), name, kernel_pool())
        self.weights = PackedWeights(self.codes, self.scales, self.layout)

    def weights_moved(self) -> None:
        """Codes and scales lie elsewhere now."""
        self.weights = PackedWeights(self.codes, self.scales, self.layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        if rows.is_cuda:
            from gpu_kernels.linear import packed_linear as packed_linear_on_gpu

            out = packed_linear_on_gpu(rows, self.codes, self.scales, self.layout, self.bias)
            return out.view(*x.shape[:-1], self.out_features)
        out = x.new_empty(len(rows), self.out_features)
        step = max(1, _SCRATCH_NBYTES // (4 * self.out_features))
        pool = kernel_pool()
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            packed_linear(rows[part], self.weights, out[part], self.bias, pool)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear's, and the format."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.layout.format}"
