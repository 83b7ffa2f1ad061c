"""Keeps freed memory in the process, so that tensors' buffers are not fetched anew each time."""

import ctypes
import os
import sys
from typing import Final

__all__ = ["keep_freed_memory"]

# glibc's malloc.h
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**31 - 1
_OWN_SETTINGS: Final = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let glibc keep buffers under 2 GB when they are freed, instead of giving them back.

    On a CPU torch takes and frees a buffer for every operation, and each that comes from the system
    is filled with zeros, page by page. That is a tenth of the time of answering and fitting.

    Returns:
        Whether it is so now. False where there is no glibc, or where the user has set the
        allocator by the environment.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return all(mallopt(name, _LARGEST) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
