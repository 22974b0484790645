"""Take time and peak memory of two ways to the same result, and the rate of matrix products that both are held against."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from experiments.benchmark.work import Product

T = TypeVar("T")
S = TypeVar("S")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002


@dataclass
class Timing(Generic[T]):
    """What one path took."""

    result: T
    """Of its last pass."""
    peak_bytes: int
    """Greatest resident memory of the process during the untimed pass."""
    working_bytes: int
    """The part of it that the pass itself added."""
    device_bytes: int
    """Greatest memory allocated on the device; 0 without one."""
    samples: list[float] = field(default_factory=list)
    """Seconds of the timed passes."""

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


class PeakMemory:
    """Hold the greatest resident memory between entering and leaving, freed memory given back to the system first.

    The kernel's own high-water mark where it can be reset (Linux), else samples every few milliseconds.
    """

    peak = 0
    start = 0

    def __enter__(self) -> PeakMemory:
        gc.collect(1)  # whole collections take long; one is made before every part
        _give_back_freed()
        self.start = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._sampler = None if _reset_high_water(self.start) else threading.Thread(target=self._sample, daemon=True)
        if self._sampler is not None:
            self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sampler is None:
            self.peak = max(self.peak, _status("VmHWM"))
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """Return the process's resident memory."""
    return int(psutil.Process().memory_info().rss)


def _status(key: str) -> int:
    """Return a line of /proc/self/status in bytes; 0 where there is none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _reset_high_water(resident: int) -> bool:
    """Set the high-water mark to what is resident now; tell whether the kernel did."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return 0 < _status("VmHWM") <= resident + 2**24


def _give_back_freed() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass


class Meter:
    """Measures on one device; counts passes, not ideas."""

    def __init__(self, device: torch.device, *, repeats: int, long_seconds: float) -> None:
        """Args:
        repeats: timed passes of each path.
        long_seconds: a plain pass that takes longer is made only twice, the untimed one counted.
        """
        self.device = device
        self.repeats = repeats
        self.long_seconds = long_seconds

    def alternate(self, fast: Callable[[], T], plain: Callable[[], S]) -> tuple[Timing[T], Timing[S]]:
        """Take both paths by turns: plain, fast, plain, fast ... after a pass of each for memory that also warms up."""
        slow, slow_seconds = self._first(plain)
        quick, quick_seconds = self._first(fast)
        passes = self.repeats
        if slow_seconds > self.long_seconds:
            slow.samples, quick.samples = [slow_seconds], [quick_seconds]
            passes = min(passes, 2) - 1
        for _ in range(passes):
            self._again(slow, plain)
            self._again(quick, fast)
        return quick, slow

    def alone(self, path: Callable[[], T]) -> Timing[T]:
        """Take one path `repeats` times."""
        timing, _ = self._first(path)
        for _ in range(self.repeats):
            self._again(timing, path)
        return timing

    def _again(self, timing: Timing[T], path: Callable[[], T]) -> None:
        seconds, timing.result = self.timed(path)
        timing.samples.append(seconds)

    def timed(self, path: Callable[[], T]) -> tuple[float, T]:
        """Return the seconds that a path takes, the device's work included, and its result."""
        self._wait()
        started = time.perf_counter()
        result = path()
        self._wait()
        return time.perf_counter() - started, result

    def _first(self, path: Callable[[], T]) -> tuple[Timing[T], float]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        with PeakMemory() as memory:
            seconds, result = self.timed(path)
        on_device = torch.cuda.max_memory_allocated(self.device) if cuda else 0
        return Timing(result, memory.peak, memory.peak - memory.start, on_device), seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Rates:
    """Matrix products per second on a device, measured once for each shape and dtype that is asked about."""

    def __init__(self, device: torch.device, *, most_rows: int, samples: int = 5) -> None:
        """Args: most_rows: rows of a measured product, at most; more rows would not be faster."""
        self.device = device
        self.most_rows = most_rows
        self.samples = samples
        self.measured: dict[str, float] = {}
        """Shape and dtype to floating-point operations per second, for the record."""

    def limit_seconds(self, work: Iterable[Product]) -> float:
        """Return the least time that products take at the rate of their shape."""
        return sum(product.flops / self.rate(product) for product in work)

    def rate(self, product: Product) -> float:
        """Return operations per second of products of a shape: the median of some samples."""
        rows = min(product.rows, self.most_rows)
        key = f"{product.batch}x{rows}x{product.inner}x{product.columns} {str(product.dtype).removeprefix('torch.')}"
        if key not in self.measured:
            self.measured[key] = self._measure(product.batch, rows, product.inner, product.columns, product.dtype)
        return self.measured[key]

    def _measure(self, batch: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        make = {"dtype": dtype, "device": self.device}
        left = torch.ones(batch, rows, inner, **make) if batch > 1 else torch.ones(rows, inner, **make)  # type: ignore[call-overload]
        # As a linear layer's weight lies in memory, [columns, inner].
        right = torch.ones(*((batch,) if batch > 1 else ()), columns, inner, **make).mT  # type: ignore[call-overload]
        left.uniform_(-1.0, 1.0)
        right.uniform_(-1.0, 1.0)
        meter = Meter(self.device, repeats=1, long_seconds=0.0)
        out = torch.matmul(left, right)
        first, _ = meter.timed(lambda: torch.matmul(left, right, out=out))
        count = max(int(0.01 / max(first, 1e-7)), 1)  # at least some milliseconds a sample

        def several() -> None:
            for _ in range(count):
                torch.matmul(left, right, out=out)

        seconds = statistics.median(meter.timed(several)[0] for _ in range(self.samples))
        return 2.0 * batch * rows * inner * columns * count / seconds
