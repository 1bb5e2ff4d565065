"""The device that a stage computes on."""

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
    """Return the names that `resolve_device` accepts on this machine, except `auto`."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into an existing device.

    `auto` takes the first CUDA device, else Apple's GPU, else the CPU; it never fails. A plain
    `cuda` is the current CUDA device, which a launcher may have set.

    Raises:
        DeviceError: The name is not one of these, or the machine does not have the device.
    """
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        raise DeviceError(
            f"device {name!r} is not known; allowed: auto, cpu, cuda, cuda:INDEX, mps"
        )
    kind, index = match[1].partition(":")[0], match[2]
    if kind == "auto":
        mps = torch.backends.mps.is_available
        kind = "cuda" if torch.cuda.is_available() else "mps" if mps() else "cpu"
    reason = ""
    if kind == "cuda" and torch.cuda.is_available():
        number = torch.cuda.current_device() if index is None else int(index)
        if number < torch.cuda.device_count():
            return torch.device("cuda", number)
    elif kind == "cuda":
        if torch.version.cuda or torch.version.hip:
            reason = " (no GPU or no driver)"
        else:
            reason = f" (torch {torch.__version__} is built without CUDA)"
    elif kind == "cpu" or torch.backends.mps.is_available():
        return torch.device(kind)
    raise DeviceError(
        f"device {name!r} is not available{reason}; allowed: {', '.join(_available())}"
    )


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors, from now on in this process.

    By default glibc maps memory for each large tensor and unmaps it when the tensor is freed. The
    system then has to zero the pages of every layer's output, which takes a third of a
    convolutional network's time on a CPU (docs/benchmarks.md). Systems without glibc are left as
    they are.
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
