"""Which device a stage computes on, from what the user typed."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys

import torch

from .errors import DeviceError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_NAME = re.compile(r"(auto|cpu|mps|cuda(?::(\d+))?)")


def _available() -> list[str]:
    """Names that `resolve_device` would accept on this machine, `auto` aside."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there.

    `auto` takes the first CUDA device, else Apple's GPU, else the CPU; it never fails. A plain
    `cuda` is the current CUDA device, which a launcher may have set.

    Raises:
        DeviceError: the name is not one of these, or the device is not on this machine.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise DeviceError(
            f"device {name!r} is not known; allowed: auto, cpu, cuda, cuda:INDEX, mps"
        )
    kind, index = found[1].partition(":")[0], found[2]
    if kind == "auto":
        mps = torch.backends.mps.is_available
        kind = "cuda" if torch.cuda.is_available() else "mps" if mps() else "cpu"
    why = ""
    if kind == "cuda" and torch.cuda.is_available():
        number = torch.cuda.current_device() if index is None else int(index)
        if number < torch.cuda.device_count():
            return torch.device("cuda", number)
    elif kind == "cuda":
        built = torch.version.cuda or torch.version.hip
        without = f"torch {torch.__version__} is built without CUDA"
        why = f" ({'no GPU or no driver' if built else without})"
    elif kind == "cpu" or torch.backends.mps.is_available():
        return torch.device(kind)
    raise DeviceError(f"device {name!r} is not there{why}; available: {', '.join(_available())}")


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, for the rest of the process.

    By default it maps every large tensor anew and gives it back when it is freed, so that each
    layer's output is made of pages that the system zeroes first: a third of a convolutional
    network's time on a CPU (docs/benchmarks.md). Elsewhere than on Linux with glibc nothing
    happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_M_MMAP_THRESHOLD, 2**30),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)
