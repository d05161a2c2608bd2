"""A fixed sequence of launches as one CUDA graph."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mambakit.ops import _cuda

from .multiplication import workspace_in

_capture = threading.Lock()


class Graph:
    """What ``queue`` queues on torch's current stream of a GPU, launched as one.

    Nothing may be allocated or waited for in it, and what its kernels read and write must stay
    where it is.

    Args:
        device: The GPU.
        queue: Queues the launches.
        multiplies: Whether a library's products are among them, which need memory to work in:
            the graph has its own.

    Raises:
        RuntimeError: The driver refuses; the message says why.
    """

    def __init__(
        self, device: torch.device, queue: Callable[[], None], *, multiplies: bool = False
    ) -> None:
        from cuda.bindings import driver

        self._device = torch.device(device)
        self._launch = driver.cuGraphLaunch
        with torch.cuda.device(device):
            self._index = torch.cuda.current_device()
            # given back after the graph is: finalizers run before what an object holds goes
            self._pool = torch.cuda.MemPool() if multiplies else None
            stream = torch.cuda.Stream(device)
            with (
                torch.cuda.stream(stream),
                nullcontext() if self._pool is None else workspace_in(self._pool),
            ):
                self._graph = _captured(stream.cuda_stream, queue)
        # at the process's end the driver may be gone
        weakref.finalize(self, _destroy, self._graph, self._device).atexit = False

    def launch(self) -> None:
        """Queue it on torch's current stream of its GPU.

        Raises:
            RuntimeError: The driver refuses; the message says why.
        """
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                self.launch()
            return
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        (status,) = self._launch(self._graph, stream)
        if status:
            _cuda._check("driver", status, "launch a graph")


def _captured(stream: int, queue: Callable[[], None]) -> Any:
    """Return what is queued on a stream as a graph that can be launched."""
    from cuda.bindings import driver

    handle = driver.CUstream(stream)
    # other threads may do what they like meanwhile
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with _nothing_collected():
        (status,) = driver.cuStreamBeginCapture(handle, mode)
        _cuda._check("driver", status, "begin a graph")
        ended = None
        try:
            try:
                queue()
            finally:
                ended = driver.cuStreamEndCapture(handle)
            _cuda._check("driver", ended[0], "end a graph")
            status, graph = driver.cuGraphInstantiate(ended[1], 0)
            _cuda._check("driver", status, "make a graph")
            return graph
        finally:
            # what was captured goes, whatever came of it
            if ended is not None and not ended[0]:
                driver.cuGraphDestroy(ended[1])


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect no garbage: a ``Graph`` in it would wait for the GPU, which ends a capture."""
    with _capture:  # or the first of two threads to end would let the other's be collected
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _destroy(graph: Any, device: torch.device) -> None:
    from cuda.bindings import driver

    torch.cuda.synchronize(device)  # it may be running
    driver.cuGraphExecDestroy(graph)
