"""The few calls of the CUDA driver that inference needs, over ctypes: a deployment installs no other CUDA package.

`libcuda` comes with the driver, so that a machine that can run a TensorRT plan has it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

_HANDLE = ctypes.c_void_p
_CAPTURE_RELAXED = 2
_NO_TIMING = 2
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76


class CudaError(RuntimeError):
    """The driver refused a call."""


class Driver:
    """libcuda with one GPU's primary context."""

    def __init__(self, index: int = 0):
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise RuntimeError(
                "no NVIDIA driver on this machine (libcuda.so.1): a TensorRT plan needs an NVIDIA GPU"
            ) from None
        self.call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= index < count.value:
            raise RuntimeError(f"device cuda:{index}: this machine has {count.value} NVIDIA GPU(s)")
        self._device, self._context = ctypes.c_int(), _HANDLE()
        self.call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(index))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.activate()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function and raise CudaError when it fails."""
        code = getattr(self._lib, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def activate(self) -> None:
        """Make this context the calling thread's."""
        self.call("cuCtxSetCurrent", self._context)

    def architecture(self) -> str:
        """The GPU's, such as sm_90."""
        values = []
        for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._device)
            values.append(value.value)
        return f"sm_{values[0]}{values[1]}"


class Stream:
    """A stream of work on the GPU."""

    def __init__(self, driver: Driver):
        self._driver, self.handle = driver, _HANDLE()
        driver.call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(1))  # not blocked by the default stream

    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` puts on this stream, for replay."""
        self._driver.call("cuStreamBeginCapture_v2", self.handle, ctypes.c_int(_CAPTURE_RELAXED))
        graph = _HANDLE()
        try:
            work()
        finally:
            self._driver.call("cuStreamEndCapture", self.handle, ctypes.byref(graph))
        return CudaGraph(self._driver, graph)

    def close(self) -> None:
        self._driver.call("cuStreamDestroy_v2", self.handle)


class Event:
    """A mark in a stream's work, to wait for what was put there before it."""

    def __init__(self, driver: Driver):
        self._driver, self._handle = driver, _HANDLE()
        driver.call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(_NO_TIMING))

    def record(self, stream: Stream) -> None:
        self._driver.call("cuEventRecord", self._handle, stream.handle)

    def synchronize(self) -> None:
        self._driver.call("cuEventSynchronize", self._handle)

    def close(self) -> None:
        self._driver.call("cuEventDestroy_v2", self._handle)


class CudaGraph:
    """Recorded work: one launch instead of hundreds."""

    def __init__(self, driver: Driver, graph: ctypes.c_void_p):
        self._driver, self._executable = driver, _HANDLE()
        driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        driver.call("cuGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        self._driver.call("cuGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        self._driver.call("cuGraphExecDestroy", self._executable)


class Buffer:
    """A device buffer and the pinned host memory it is copied from or to, `host` as a numpy array."""

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: Any = np.float32):
        self._driver = driver
        self.bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.device, self._host = ctypes.c_uint64(), _HANDLE()
        driver.call("cuMemAlloc_v2", ctypes.byref(self.device), ctypes.c_size_t(self.bytes))
        driver.call("cuMemHostAlloc", ctypes.byref(self._host), ctypes.c_size_t(self.bytes), ctypes.c_uint(0))
        assert self._host.value is not None  # the call succeeded
        memory = (ctypes.c_char * self.bytes).from_address(self._host.value)
        self.host = np.frombuffer(memory, dtype).reshape(shape)

    def upload(self, stream: Stream) -> None:
        size = ctypes.c_size_t(self.bytes)
        self._driver.call("cuMemcpyHtoDAsync_v2", self.device, self._host, size, stream.handle)

    def download(self, stream: Stream) -> None:
        size = ctypes.c_size_t(self.bytes)
        self._driver.call("cuMemcpyDtoHAsync_v2", self._host, self.device, size, stream.handle)

    def close(self) -> None:
        self._driver.call("cuMemFree_v2", self.device)
        self._driver.call("cuMemFreeHost", self._host)
