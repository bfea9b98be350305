"""The TensorRT session's own logic against a stand-in for driver and TensorRT, and against the real ones on a GPU."""

import ctypes
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Upscaler
from engine.build import builder as build
from engine.runtime import manifest as manifests
from engine.runtime.backends import tensorrt as backend
from engine.runtime.backends.cuda import Buffer, CudaError, Driver
from engine.runtime.manifest import FolderError, Profile

no_gpu = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU here")


class FakeDriver:
    """Host memory in place of the GPU's. Work on a stream waits, as late as it may, until somebody waits for it."""

    def __init__(self, index=0, capture_fails=False):
        self.memory, self.freed, self.events = {}, [], set()
        self.calls, self.recording, self.graphs = [], None, {}
        self.capture_fails, self.queue, self.contexts = capture_fails, [], []

    def activate(self):
        pass

    def architecture(self):
        return "sm_90"

    def do(self, work):
        (self.queue if self.recording is None else self.recording).append(work)

    def wait(self, event=None):
        while self.queue:
            work = self.queue.pop(0)
            if work == event:
                return
            if callable(work):
                work()

    def handle(self, pointer, value):
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] = value

    def call(self, name, *a):
        self.calls.append(name)
        if name in ("cuMemAlloc_v2", "cuMemHostAlloc"):
            memory = ctypes.create_string_buffer(a[1].value)
            self.memory[ctypes.addressof(memory)] = memory
            self.handle(a[0], ctypes.addressof(memory))
        elif name in ("cuMemFree_v2", "cuMemFreeHost"):
            assert not self.queue  # what is freed may be in use
            memory = self.memory.pop(a[0].value)
            ctypes.memset(memory, 0xFF, len(memory))  # whoever still reads it gets what is not a number
            self.freed.append(memory)
        elif name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
            to, source, size = (v.value for v in a[:3])
            self.do(lambda: ctypes.memmove(to, source, size))
        elif name == "cuStreamSynchronize":
            self.wait()
        elif name == "cuEventCreate":
            self.handle(a[0], len(self.calls))
            self.events.add(len(self.calls))
        elif name == "cuEventDestroy_v2":
            self.events.remove(a[0].value)
        elif name == "cuEventRecord":
            self.do(a[0].value)
        elif name == "cuEventSynchronize":
            assert a[0].value in self.events
            if a[0].value in self.queue:
                self.wait(a[0].value)
        elif name == "cuStreamBeginCapture_v2":
            if self.capture_fails:
                raise CudaError("cuStreamBeginCapture_v2: operation not permitted (800)")
            self.recording = []
        elif name == "cuStreamEndCapture":
            self.handle(a[1], len(self.graphs) + 1)
            self.graphs[len(self.graphs) + 1], self.recording = self.recording, None
        elif name == "cuGraphInstantiateWithFlags":
            self.handle(a[0], a[1].value)
        elif name == "cuGraphLaunch":
            for work in self.graphs[a[0].value]:
                self.do(work)


class FakeContext:
    """output = image * 2 + mean(noise), on the addresses that it was given."""

    def __init__(self, driver):
        self.driver, self.shapes, self.addresses = driver, {}, {}
        self.profile, self.runs = 0, 0
        driver.contexts.append(self)

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return profile < 2

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape[0] <= 4 and (self.profile == 0 or shape in ((1, 3, 256, 256), (1, 48, 64, 64)))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.runs += 1

        def view(name, shape):
            return np.ctypeslib.as_array(ctypes.cast(addresses[name], ctypes.POINTER(ctypes.c_float)), shape)

        def work():
            image, noise = view("image", shapes["image"]), view("noise", shapes["noise"])
            view("output", shapes["image"])[...] = image * 2 + noise.mean()

        self.driver.do(work)
        return True


def fake_module(driver, plan):
    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            engine = SimpleNamespace(create_execution_context=lambda: FakeContext(driver), num_optimization_profiles=2)
            return engine if data == plan else None

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    return SimpleNamespace(__version__="10.8.0", Runtime=Runtime, ILogger=ILogger)


@pytest.fixture
def folder(tiny_engine, tmp_path):
    """The tiny engine's folder with bytes that stand for a plan."""
    out = tmp_path / "plan"
    shutil.copytree(tiny_engine, out)
    content = json.loads((out / "manifest.json").read_text())
    (out / "generator.plan").write_bytes(b"plan")
    digest = hashlib.sha256(b"plan").hexdigest()
    content["graphs"]["generator"] |= {"file": "generator.plan", "sha256": digest}
    content |= {"backend": "tensorrt", "backend_version": "10.8.0", "architecture": "sm_90"}
    data = json.dumps(content).encode()
    (out / "manifest.json").write_bytes(data)
    (out / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
    return out


def load(folder, monkeypatch, plan=b"plan", **options):
    driver = FakeDriver(**options)
    monkeypatch.setattr(backend, "Driver", lambda index: driver)
    monkeypatch.setattr(backend, "load_module", lambda name: fake_module(driver, plan))
    return Upscaler.load(folder, trust_plan=True).sessions["generator"], driver


def inputs(batch, side, seed):
    rng = np.random.default_rng(seed)
    image = rng.random((batch, 3, side, side), dtype=np.float32)
    return {"image": image, "noise": rng.random((batch, 48, side // 4, side // 4), dtype=np.float32)}


@pytest.mark.parametrize("capture_fails", [False, True])
def test_every_shape_has_its_buffers_and_its_graph(folder, monkeypatch, capture_fails):
    session, driver = load(folder, monkeypatch, capture_fails=capture_fails)
    sizes = [(1, 64), (2, 64), (1, 128)]
    for seed in range(4):  # shapes alternate: a graph must replay on its own buffers
        for batch, side in sizes:
            given = inputs(batch, side, seed)
            expected = given["image"] * 2 + given["noise"].mean()
            assert np.allclose(session(given), expected, atol=1e-6)
    assert driver.calls.count("cuMemAlloc_v2") == 9  # two inputs and an output for each shape, once
    assert driver.calls.count("cuGraphLaunch") == (0 if capture_fails else 9)  # all but each shape's first call
    session.close()
    assert not driver.memory


def test_buffers_of_old_shapes_are_given_back(folder, monkeypatch):
    session, driver = load(folder, monkeypatch)
    for side in range(64, 64 + 16 * 10, 16):
        session(inputs(1, side, 0))
    assert len(driver.memory) == 6 * backend._KEPT_SHAPES
    for side in (160, 64, 160, 80, 160, 96, 160):  # the oldest shape, used again and again, stays
        before = driver.calls.count("cuMemAlloc_v2")
        session(inputs(1, side, 0))
        assert driver.calls.count("cuMemAlloc_v2") - before == (0 if side == 160 else 3)


def test_a_batch_under_way_outlives_the_buffers_of_its_shape(folder, monkeypatch):
    session, driver = load(folder, monkeypatch)
    given = inputs(1, 64, 7)
    finish = session.start(given)
    for side in range(80, 80 + 16 * backend._KEPT_SHAPES, 16):
        session(inputs(1, side, 0))
    assert len(driver.memory) == 6 * backend._KEPT_SHAPES
    assert np.allclose(finish(), given["image"] * 2 + given["noise"].mean(), atol=1e-6)


@pytest.mark.parametrize("capture_fails", [False, True])
def test_the_next_batch_is_prepared_while_the_gpu_works(folder, monkeypatch, photo, capture_fails):
    driver = FakeDriver(capture_fails=capture_fails)
    monkeypatch.setattr(backend, "Driver", lambda index: driver)
    monkeypatch.setattr(backend, "load_module", lambda name: fake_module(driver, b"plan"))
    up = Upscaler.load(folder, trust_plan=True)
    session = up.sessions["generator"]
    rgb = np.ascontiguousarray(photo[:60, :130])
    ours = up.upscale(rgb, seed=1, tile=32, batch=2)  # rows of an odd number of tiles: two shapes alternate
    calls = [n for n in driver.calls if n in ("cuMemcpyHtoDAsync_v2", "cuEventSynchronize")]
    assert calls[:5] == ["cuMemcpyHtoDAsync_v2"] * 4 + ["cuEventSynchronize"]  # two uploads a batch
    session.at_once = 1  # one after the other
    assert np.array_equal(ours, up.upscale(rgb, seed=1, tile=32, batch=2))


def test_batches_left_behind_by_a_cancelled_run_harm_nothing(folder, monkeypatch):
    session, driver = load(folder, monkeypatch)
    for seed in range(4):
        session.start(inputs(1, 64, seed))
    given = inputs(1, 64, 9)
    assert np.allclose(session(given), given["image"] * 2 + given["noise"].mean(), atol=1e-6)
    assert driver.calls.count("cuMemAlloc_v2") == 6  # two of each buffer, not more
    first, second = session.start(inputs(1, 64, 0)), session.start(inputs(1, 64, 1))
    for seed, finish in enumerate((first, second)):
        given = inputs(1, 64, seed)
        assert np.allclose(finish(), given["image"] * 2 + given["noise"].mean(), atol=1e-6)
    session.close()
    assert not driver.memory


def test_a_plan_that_tensorrt_refuses_is_a_clear_error(folder, monkeypatch):
    with pytest.raises(
        FolderError, match=r"plan: tensorrt refuses the plan .*; build it again: python -m engine.build"
    ):
        load(folder, monkeypatch, plan=b"another")


def test_the_usual_shape_has_a_profile_of_its_own(folder, monkeypatch):
    session, driver = load(folder, monkeypatch)
    session.manifest = replace(session.manifest, profile=Profile((1, 1, 4), (64, 256, 512)))
    for batch, side in ((1, 256), (1, 64), (1, 256), (4, 256)):
        given = inputs(batch, side, side)
        assert np.allclose(session(given), given["image"] * 2 + given["noise"].mean(), atol=1e-6)
    wide, usual = sorted(driver.contexts, key=lambda context: context.profile)
    assert (wide.profile, wide.runs, usual.profile, usual.runs) == (0, 4, 1, 2)  # each shape: once, and recorded
    with pytest.raises(ValueError, match="beyond the plan's profile"):  # teeth: the stand-in's second profile is narrow
        session._bind(usual, session._state(given), given)


@pytest.mark.parametrize("side", [64, 256])  # of either profile
def test_too_little_memory_for_a_context_is_one_line(folder, monkeypatch, side):
    session, _ = load(folder, monkeypatch)
    session.manifest = replace(session.manifest, profile=Profile((1, 1, 4), (64, 256, 512)))
    monkeypatch.setattr(session._engine, "create_execution_context", lambda: session._log.append("out of memory"))
    with pytest.raises(RuntimeError, match=r"generator.plan: no context \(out of memory\)"):
        session(inputs(1, side, 0))


def test_a_shape_beyond_the_plan_is_named(folder, monkeypatch):
    session, _ = load(folder, monkeypatch)
    with pytest.raises(ValueError, match=r"image \(5, 3, 64, 64\) is beyond the plan's profile"):
        session(inputs(5, 64, 0))


def test_without_a_driver_the_reason_is_named(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        Driver()


@pytest.mark.gpu
@no_gpu
def test_a_real_plan_gives_the_picture_of_onnx_runtime(tiny_engine, photo, tmp_path):
    """On a GPU with TensorRT or TensorRT-RTX."""
    for name in ("tensorrt", "tensorrt-rtx"):
        try:
            backend.load_module(name)
        except RuntimeError:
            continue
        build.build(tiny_engine, tmp_path / name, name)
        assert manifests.load(tmp_path / name).backend == name
        ours = Upscaler.load(tmp_path / name).upscale(photo[:100, :80], seed=3)
        assert np.abs(ours.astype(int) - Upscaler.load(tiny_engine).upscale(photo[:100, :80], seed=3)).max() <= 2


@pytest.mark.gpu
@no_gpu
def test_buffers_on_a_real_gpu():
    driver = Driver()
    from engine.runtime.backends.cuda import Stream

    stream, a = Stream(driver), Buffer(driver, (4, 5))
    a.host[...] = np.arange(20).reshape(4, 5)
    a.upload(stream)
    stream.synchronize()
    a.host[...] = 0
    a.download(stream)
    stream.synchronize()
    assert np.array_equal(a.host.ravel(), np.arange(20))
