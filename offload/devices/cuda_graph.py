"""A decode step as a CUDA graph, on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offload.devices.cuda_stream import CudaStream, HostFunctionStream
from offload.errors import CaptureError, DeviceError
from offload.step_graph.graph import StepGraph


class CudaGraph(StepGraph):
    """Torch's graph, with the doorbell's operations of the driver in it."""

    def __init__(self, device: torch.device, *, functions: bool | None = None) -> None:
        """Make a stream.

        Args:
            device: whose graph it is.
            functions: ring by functions on the host (cuLaunchHostFunc) instead of by stream memory operations; None
                where the driver refuses those.

        Raises:
            DeviceError: there is no driver.
        """
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._bell = self._find_bell() if functions is None else self._make_bell(functions=functions)

    def _make_bell(self, *, functions: bool) -> CudaStream:
        return HostFunctionStream(self._side) if functions else CudaStream(self._side)

    def _find_bell(self) -> CudaStream:
        """Whichever way of writing a word the driver takes."""
        with torch.cuda.device(self._device):
            word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            try:
                bell = self._make_bell(functions=False)
                bell.write_value(word.data_ptr(), 1)
                bell.wait_value(word.data_ptr(), 1)
            except DeviceError:
                return self._make_bell(functions=True)
            self._side.synchronize()
        return bell

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the stream; the one on the host must be pinned."""
        self._bell.copy(target, source)

    def write_value(self, address: int, value: int) -> None:
        """See `Stream`."""
        self._bell.write_value(address, value)

    def wait_value(self, address: int, value: int) -> None:
        """See `Stream`."""
        self._bell.wait_value(address, value)

    def call(self, kernels: Callable[[], None]) -> None:
        """Launch them; a graph keeps launches."""
        kernels()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Within the block work goes to the stream, after what the caller's stream has been given."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            # Whoever reads results next does so on his own stream.
            self._side.synchronize()

    def run(self, step: Callable[[], None]) -> None:
        """Do it on the stream."""
        with self._on_stream():
            step()

    def capture(self, step: Callable[[], None]) -> None:
        """Keep the step's operations, doing none.

        Threads that copy experts go on meanwhile: only this one must not wait for the device.

        Raises:
            CaptureError: CUDA refuses an operation in a capture.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                # A capture that fails leaves its stream current.
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            raise CaptureError(f"CUDA cannot capture a decode step: {error}") from error
        self._graph = graph

    def replay(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One launch."""
        if self._graph is None:
            raise RuntimeError("nothing was captured")
        with self._on_stream():
            self._graph.replay()
            meanwhile()
