"""A fixed sequence of launches as one CUDA graph."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from mambakit.ops import _cuda


class Graph:
    """What ``queue`` queues on torch's current stream of a GPU, launched as one.

    Nothing may be allocated or waited for in it, and what its kernels read and write must stay
    where it is.

    Raises:
        RuntimeError: The driver refuses; the message says why.
    """

    def __init__(self, device: torch.device, queue: Callable[[], None]) -> None:
        from cuda.bindings import driver

        self._device = torch.device(device)
        self._launch = driver.cuGraphLaunch
        stream = torch.cuda.Stream(device)
        # other threads may do what they like meanwhile
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self._index = torch.cuda.current_device()
            # what a library's products need on a stream that they have not seen is made now
            torch.cuda.current_blas_handle()
            handle = driver.CUstream(stream.cuda_stream)
            (status,) = driver.cuStreamBeginCapture(handle, mode)
            _cuda._check("driver", status, "begin a graph")
            try:
                queue()
            finally:
                status, graph = driver.cuStreamEndCapture(handle)
            _cuda._check("driver", status, "end a graph")
            try:
                status, self._graph = driver.cuGraphInstantiate(graph, 0)
                _cuda._check("driver", status, "make a graph")
            finally:
                driver.cuGraphDestroy(graph)
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


def _destroy(graph: Any, device: torch.device) -> None:
    from cuda.bindings import driver

    torch.cuda.synchronize(device)  # it may be running
    driver.cuGraphExecDestroy(graph)
