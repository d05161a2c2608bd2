"""A graph is captured, launched and given back; the driver is made up."""

import contextlib
import gc
import weakref

import pytest
import torch

from mambakit.generation.gpu_step.graph import Graph

STREAM = 7
DEVICE = 1


class Pool:
    """Memory that knows whether it is there."""


@pytest.fixture
def driver(monkeypatch, chosen_device):
    """A driver that notes what it is asked, and a torch that knows a stream."""
    if chosen_device.type == "cuda":
        pytest.skip("there is a driver, which the other tests ask")
    driver = pytest.importorskip("cuda.bindings.driver")
    good = driver.CUresult.CUDA_SUCCESS
    noted = {
        "device": DEVICE,
        "calls": [],
        "status": dict.fromkeys(("end", "instantiate", "launch"), good),
    }

    def note(name, *values):
        def call(*arguments):
            noted["calls"].append((name, *map(int, arguments)))
            return (noted["status"].get(name, good), *values)

        return call

    @contextlib.contextmanager
    def chosen(device):
        before, noted["device"] = noted["device"], device
        yield
        noted["device"] = before

    class Stream:
        cuda_stream = STREAM

    monkeypatch.setattr(driver, "cuStreamBeginCapture", note("begin"))
    monkeypatch.setattr(driver, "cuStreamEndCapture", note("end", 11))
    monkeypatch.setattr(driver, "cuGraphInstantiate", note("instantiate", 12))
    monkeypatch.setattr(driver, "cuGraphDestroy", note("destroy"))
    monkeypatch.setattr(driver, "cuGraphLaunch", note("launch"))
    monkeypatch.setattr(driver, "cuGraphExecDestroy", note("give back"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: noted["device"], raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False
    )

    @contextlib.contextmanager
    def in_pool(pool):
        noted["calls"].append("into the pool")
        yield
        noted["calls"].append("out of the pool")

    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", in_pool)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", note("forget"), raising=False)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", note("products"))
    monkeypatch.setattr(torch.cuda, "synchronize", note("wait"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch, "device", lambda index: index)
    return noted


def test_a_graph_is_captured_launched_and_given_back(driver):
    graph = Graph(DEVICE, lambda: driver["calls"].append("queued"))
    thread_local = 1
    captured = [("begin", STREAM, thread_local), "queued", ("end", STREAM)]
    assert driver["calls"] == [*captured, ("instantiate", 11, 0), ("destroy", 11)]
    driver["calls"].clear()
    graph.launch()
    graph.launch()
    assert driver["calls"] == [("launch", 12, STREAM + DEVICE)] * 2
    driver["calls"].clear()
    driver["device"] = 0
    graph.launch()
    assert driver["calls"] == [("launch", 12, STREAM + DEVICE)]
    assert driver["device"] == 0
    driver["calls"].clear()
    del graph
    gc.collect()
    assert driver["calls"] == [("wait", DEVICE), ("give back", 12)]


def test_what_the_driver_refuses_is_told(driver):
    from cuda.bindings.driver import CUresult

    refused = CUresult.CUDA_ERROR_INVALID_VALUE
    for name, sentence in (
        ("end", "end a graph"),
        ("instantiate", "make a graph"),
        ("launch", "launch a graph"),
    ):
        driver["status"][name] = refused
        with pytest.raises(RuntimeError, match=f"could not {sentence}: CUDA_ERROR_INVALID"):
            Graph(DEVICE, lambda: None).launch()
        driver["status"][name] = CUresult.CUDA_SUCCESS


def test_what_fails_while_it_is_queued_ends_the_capture(driver):
    def fail():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        Graph(DEVICE, fail)
    assert [call[0] for call in driver["calls"]] == ["begin", "end", "destroy"]


def test_what_cannot_be_captured_is_not_given_back(driver):
    from cuda.bindings.driver import CUresult

    driver["status"]["end"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    with pytest.raises(RuntimeError, match="could not end a graph"):
        Graph(DEVICE, lambda: None)
    assert [call[0] for call in driver["calls"]] == ["begin", "end"]


def test_products_work_in_memory_of_the_graph(driver):
    graph = Graph(DEVICE, lambda: driver["calls"].append("queued"), multiplies=True)
    names = [call if isinstance(call, str) else call[0] for call in driver["calls"]]
    captured = ["begin", "queued", "end", "instantiate", "destroy"]
    workspace = ["into the pool", "forget", "products", *captured, "forget"]
    assert names == [*workspace, "out of the pool"]
    pool = weakref.ref(graph._pool)
    driver["calls"].clear()
    held = []
    weakref.finalize(graph, lambda: held.append(pool() is not None))
    del graph
    gc.collect()
    assert driver["calls"] == [("wait", DEVICE), ("give back", 12)]
    assert held == [True]
    assert pool() is None


def test_without_a_cache_nothing_is_forgotten(driver, monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    Graph(DEVICE, lambda: None, multiplies=True)
    names = [call[0] for call in driver["calls"]]
    assert names[:5] == ["products", "begin", "end", "instantiate", "destroy"]
    assert "forget" not in names


def test_products_are_forgotten_when_queueing_fails(driver):
    def fail():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        Graph(DEVICE, fail, multiplies=True)
    assert driver["calls"][-1] == ("forget",)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_collected_while_it_is_queued(driver, enabled, fails):
    seen = []

    def queue():
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("no such kernel")

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(RuntimeError):
            Graph(DEVICE, queue)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]
