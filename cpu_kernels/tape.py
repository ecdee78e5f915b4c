"""A tape: a sequence of kernels on fixed memory that runs in one call, as a CUDA graph does on a GPU.

Calling a kernel from Python costs more than a kernel of a few thousand elements. A tape is written once, with the
addresses of weights and of scratch; what changes from call to call is patched before it runs. Each row has the bits of
the kernel's own function: `linear`, `packed_linear`, `rms_norm`, `rotary`, `decode_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import expert_mlp_jobs, packed_jobs, routing_kernel
from cpu_kernels import tape_kernel as kernel
from cpu_kernels.activation_quantisation_kernel import ELEMENT_NUMBERS, KINDS
from cpu_kernels.compiling.compiler import prepare
from cpu_kernels.decode_attention_kernel import combine_task, run_task
from cpu_kernels.expert_mlp import activation_code, shape_of_layout, task_of_format
from cpu_kernels.linear_kernel import linear_task
from cpu_kernels.packed_expert_mlp import packed_shape_of_layout, row_nbytes
from cpu_kernels.packed_kernel import OUTPUT_NUMBERS
from cpu_kernels.packed_linear import PackedWeights, code_of_format, tasks_of_format
from cpu_kernels.packed_simd import BLOCK_NBYTES
from cpu_kernels.rms_norm import FORMS, Form
from cpu_kernels.rms_norm_kernel import rms_norm_task
from cpu_kernels.rotary_kernel import rotary_task
from cpu_kernels.tape_experts_kernel import add_sums_task, choice_task, weighing_task
from cpu_kernels.tape_team_kernel import body_address, play_in_team
from cpu_kernels.team_kernel import posting_launcher
from cpu_kernels.tensors import FORMAT_OF_DTYPE, elements_of
from cpu_kernels.threads import Pool
from cpu_kernels.torch_order import orders_as_torch
from cpu_kernels.weighted_sum_kernel import weighted_sum_task
from formats.bundle import BundleLayout
from formats.packed import COLUMN_BLOCK

_ALIGNMENT_BYTES = 64
# Of weights that come next: a part of what the second-level caches of two cores hold.
_ASKED_AHEAD_NBYTES = 768 << 10


Spot = tuple[int, int]
"""Row and word of a tape, where a value stands that changes from call to call."""


class Choice(NamedTuple):
    """Where a tape writes a router's choice.

    Attributes:
        ids: int64 [tokens, top_k].
        weights: fp32 [tokens, top_k].
        shares: fp32 [tokens, experts], the probabilities but for their sum.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor


class Tape:
    """Rows of kernels for tensors of one dtype; addresses that are not known yet are 0 and patched through spots.

    The tape keeps its scratch. What else it points to must outlive it. One thread runs it at a time.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Begin a tape; what runs it is compiled or loaded now.

        Raises:
            ValueError: no kernel takes the dtype.
        """
        prepare(kernel.run_tape)
        self.elements = elements_of(dtype)
        self.dtype = dtype
        self._rows: list[list[int]] = []
        self._weights: list[tuple[int, int] | None] = []
        self._scratch: list[torch.Tensor] = []
        self._kept: list[npt.NDArray[np.int64]] = []
        self._words: npt.NDArray[np.int64] | None = None

    def scratch(self, count: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory of the tape's own, [count] of a dtype, aligned to a cache line; not initialised."""
        dtype = self.dtype if dtype is None else dtype
        storage = torch.empty(count * dtype.itemsize + _ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
        self._scratch.append(storage)
        start = -storage.data_ptr() % _ALIGNMENT_BYTES
        return storage[start : start + count * dtype.itemsize].view(dtype)

    def rms_norm(self, x: int, weight: torch.Tensor, rows: int, out: int, epsilon: float, form: Form) -> None:
        """See `rms_norm.rms_norm`; x and out are addresses of [rows, K]."""
        (columns,) = weight.shape
        self._add(
            kernel.RMS_NORM, rms_norm_task(self.elements), FORMS.index(form), self.dtype.itemsize, x, weight.data_ptr(),
            rows, columns, out, _bits(epsilon),
        )  # fmt: skip

    def linear(self, x: int, weight: torch.Tensor, bias: torch.Tensor | None, tokens: int, out: int) -> Spot:
        """See `linear.linear`; x and out are addresses of [tokens, K] and [tokens, N]; returns the spot of out."""
        rows, columns = weight.shape
        task = linear_task(self.elements)
        bias_address = 0 if bias is None else bias.data_ptr()
        row = self._add(
            kernel.LINEAR, task, self.dtype.itemsize, x, tokens, weight.data_ptr(), bias_address, rows, columns, out,
            weights=(weight.data_ptr(), weight.nbytes),
        )  # fmt: skip
        return row, 9

    def packed_linear(self, x: int, weights: PackedWeights, bias: torch.Tensor | None, tokens: int, out: int) -> Spot:
        """See `packed_linear.packed_linear`; x and out are addresses of [tokens, K] and [tokens, N].

        Returns:
            The spot of out.
        """
        layout = weights.layout
        code = code_of_format(layout.format)
        element = FORMAT_OF_DTYPE[self.dtype]
        blocks = -(-layout.columns // COLUMN_BLOCK)
        activations_nbytes = tokens * blocks * BLOCK_NBYTES[code.activation]
        words = packed_jobs.linear_words(tokens, layout.rows, activations_nbytes, element != "fp32")
        size = self.dtype.itemsize
        row = self._add(
            kernel.PACKED_LINEAR, tasks_of_format(layout.format).ctypes.data, KINDS[code.activation],
            code.codes_nbytes, ELEMENT_NUMBERS[element], OUTPUT_NUMBERS[element], x, layout.columns * size, tokens,
            *weights.addresses, 0 if bias is None else bias.data_ptr(), layout.rows, layout.columns, out,
            layout.rows * size, self.scratch(words, torch.int64).data_ptr(), words,
            weights=(weights.addresses[0], layout.codes_nbytes),
        )  # fmt: skip
        return row, 14

    def rotary(
        self, q: int, q_heads: int, k: int, k_heads: int, batch: int, width: int, cos: int, sin: int, angles: int,
        q_out: int, k_out: int, *, shared_angles: bool,
    ) -> None:  # fmt: skip
        """See `rotary.rotary`, for one position of each sequence.

        Args:
            q: address of [batch, q_heads, width].
            q_heads: heads of queries.
            k: address of [batch, k_heads, width].
            k_heads: heads of keys.
            batch: sequences.
            width: of a head.
            cos: address of [batch, angles].
            sin: likewise.
            angles: width of both.
            q_out: address, as q.
            k_out: address, as k.
            shared_angles: one angle for both elements of a pair.
        """
        pairs = angles if shared_angles else angles // 2
        self._add(
            kernel.ROTARY, rotary_task(self.elements), self.dtype.itemsize, batch, 1, width, cos, sin, angles, angles,
            pairs, 0 if shared_angles else pairs,
            q, q_heads, q_heads * width, width, q_heads * width, k, k_heads, k_heads * width, width, k_heads * width,
            q_out, k_out,
        )  # fmt: skip

    def store_rows(self, source: int, rows: int, row_elements: int) -> tuple[Spot, Spot]:
        """Copy consecutive rows to places of their own.

        Returns:
            The spots of the address of the first place and of the bytes from one place to the next.

        Raises:
            ValueError: the bytes of a row are no multiple of 8.
        """
        nbytes = row_elements * self.dtype.itemsize
        if nbytes % 8:
            raise ValueError(f"store_rows: rows of {nbytes} bytes; expected a multiple of 8")
        row = self._add(kernel.STORE_ROWS, source, 0, rows, nbytes, 0)
        return (row, 2), (row, 5)

    def attention(
        self, query: int, batch: int, kv_heads: int, group: int, width: int, out: int, scale: float
    ) -> dict[str, Spot]:
        """See `decode_attention.decode_attention`; query and out [batch, kv_heads * group, width].

        Returns:
            The spots of "tokens", of the addresses "keys" and "values", and of their strides in elements between
            sequences ("key_batch", "value_batch") and heads ("key_head", "value_head").
        """
        heads = kv_heads * group
        row = self._add(
            kernel.ATTENTION, run_task(self.elements), combine_task(self.elements), self.dtype.itemsize, batch,
            kv_heads, group, 0, width, width, query, heads * width, width, 0, 0, 0, 0, 0, 0, width, out, _bits(scale),
        )  # fmt: skip
        words = {
            "tokens": 7, "keys": 13, "key_batch": 14, "key_head": 15, "values": 16, "value_batch": 17, "value_head": 18,
        }  # fmt: skip
        return {name: (row, word) for name, word in words.items()}

    def add(self, a: int, b: int, count: int, out: int) -> tuple[Spot, Spot]:
        """Out = round(a + b), addresses of [count]; returns the spots of a and of out."""
        row = self._add(kernel.RUN_TASK, kernel.add_task(self.elements), a, b, out, count)
        return (row, 2), (row, 4)

    def choose(
        self, logits: int, experts: int, tokens: int, top_k: int, *, renormalise: bool, rounded: bool,
        ids: torch.Tensor | None = None,
    ) -> Choice:  # fmt: skip
        """See `top_k_kernel`; logits [tokens, experts].

        The ids are written to `ids`, int64 [tokens * top_k], contiguous, where it is given.

        Equals come in the order of `torch.topk` where `orders_as_torch` knows it. Where a choice is not clear the tape
        stops in front of the row of its weights: whoever plays it writes the ids and goes on there.
        """
        ids = self.scratch(tokens * top_k, torch.int64) if ids is None else ids
        choice = Choice(
            ids.view(tokens, top_k),
            self.scratch(tokens * top_k, torch.float32).view(tokens, top_k),
            self.scratch(tokens * experts, torch.float32).view(tokens, experts),
        )
        queue = self.scratch(experts, torch.int64).data_ptr() if orders_as_torch(experts, top_k) else 0
        job = (
            logits, experts, tokens, top_k, choice.ids.data_ptr(), choice.weights.data_ptr(), renormalise, rounded,
            choice.shares.data_ptr(), self.dtype.itemsize, 0, queue,
        )  # fmt: skip
        self._add(kernel.CHOOSE, choice_task(self.elements), *job)
        self._add(kernel.RUN_TASK, weighing_task(self.elements), *job)
        return choice

    def experts(
        self, layout: BundleLayout, activation: str, addresses: npt.NDArray[np.int64], choice: Choice, x: int
    ) -> int:  # fmt: skip
        """See `expert_mlp.expert_mlp` and `packed_expert_mlp`, then `weighted_sum.weighted_sum`.

        Args:
            layout: of all experts; not packed, it holds the tape's dtype.
            activation: a name that the kernels know.
            addresses: int64 [E], contiguous, of the experts' bundles, where they are when the tape runs.
            choice: as `choose` returns it.
            x: address of [tokens, H].

        Returns:
            Address of fp32 [tokens, H].

        Raises:
            ValueError: an unknown activation, or a format that does not fit.
        """
        tokens, top_k = choice.ids.shape
        ids, weights = choice.ids.data_ptr(), choice.weights.data_ptr()
        pairs, hidden, size = tokens * top_k, layout.hidden, self.dtype.itemsize
        code = activation_code(activation, layout)
        if not layout.is_packed and layout.format != FORMAT_OF_DTYPE[self.dtype]:
            raise ValueError(f"experts in {layout.format} on a tape of {self.dtype}")
        outputs, out = self.scratch(pairs * hidden, torch.float32), self.scratch(tokens * hidden, torch.float32)
        table = self.scratch(routing_kernel.TABLE_ROWS * (pairs + 1), torch.int64)
        up_columns = layout.intermediate * (1 + layout.has_gate)
        if layout.is_packed:
            kind, shape, task = kernel.PACKED_EXPERTS, packed_shape_of_layout(layout), tasks_of_format(layout.format)
            words = packed_jobs.expert_words(
                pairs, pairs, tokens * row_nbytes(hidden, layout.format),
                4 * pairs * (up_columns + layout.intermediate), pairs * row_nbytes(layout.intermediate, layout.format),
            )  # fmt: skip
            task_word = task.ctypes.data
        else:
            kind, shape, task_word = kernel.RUN_EXPERTS, shape_of_layout(layout), task_of_format(layout.format)
            nbytes = pairs * (4 * up_columns + size * layout.intermediate)
            words = expert_mlp_jobs.workspace_words(pairs, pairs) + -(-nbytes // 8) + 8
        self._kept.append(addresses)
        self._add(
            kind, shape.ctypes.data, task_word, addresses.ctypes.data, ids, weights,
            len(addresses), tokens, top_k, x, hidden, code, outputs.data_ptr(), hidden * size, table.data_ptr(),
            self.scratch(words, torch.int64).data_ptr(), words, ELEMENT_NUMBERS[FORMAT_OF_DTYPE[self.dtype]],
        )  # fmt: skip
        self._add(
            kernel.WEIGHTED_SUM, weighted_sum_task(), outputs.data_ptr(), weights, tokens, top_k, hidden,
            out.data_ptr(),
        )  # fmt: skip
        return out.data_ptr()

    def add_sums(self, a: int, sums: int, count: int, out: int) -> None:
        """Out = round(a + round(sums)), addresses of [count], sums in fp32."""
        self._add(kernel.RUN_TASK, add_sums_task(self.elements), a, sums, out, count)

    def play(self, pool: Pool, first: int = 0, end: int | None = None) -> int:
        """Run rows as they are now.

        Args:
            pool: the threads.
            first: row to begin with.
            end: row before which to end; None for all.

        Returns:
            The row at which it ended: `end`, or behind that of a choice of experts that is not clear.
        """
        words, team = self.words, pool.team
        end = len(words) if end is None else end
        ended: int
        if team is None:
            ended = kernel.run_tape(*pool.launcher, pool.threads, 0, words, first, end)
        else:
            body, launcher = body_address(), posting_launcher()
            ended = play_in_team(team.parallel, body, team.thread_number, launcher, pool.threads, words, first, end)
        return ended

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._rows)

    @property
    def words(self) -> npt.NDArray[np.int64]:
        """The rows, int64 [n, WORDS], to be patched; a tape that has been looked at takes no more rows."""
        if self._words is None:
            self._words = np.zeros((len(self._rows), kernel.WORDS), np.int64)
            for index, row in enumerate(self._rows):
                self._words[index, : len(row)] = row
            self._words[:, kernel.AHEAD :] = self._weights_ahead()
        return self._words

    def _weights_ahead(self) -> list[tuple[int, int]]:
        """For each row the weights that the next linear layer behind it begins with, up to a choice of experts."""
        ahead, known = [], (0, 0)
        for row, weights in zip(reversed(self._rows), reversed(self._weights), strict=True):
            ahead.append(known)
            if row[0] in (kernel.RUN_EXPERTS, kernel.PACKED_EXPERTS):
                known = (0, 0)
            elif weights is not None:
                known = (weights[0], min(weights[1], _ASKED_AHEAD_NBYTES))
        return ahead[::-1]

    def _add(self, *row: int, weights: tuple[int, int] | None = None) -> int:
        if self._words is not None:
            raise RuntimeError("the tape is in use: it takes no more rows")
        self._rows.append(list(row))
        self._weights.append(weights)
        return len(self._rows) - 1


def _bits(value: float) -> int:
    """The bits of the nearest fp32."""
    return int(np.float32(value).view(np.int32))
