"""Which of several processes this is, and which device is its own."""

from typing import Any

import torch

from safebridge.optional import require

__all__ = ["build_accelerator", "find_device", "is_main_process"]


def build_accelerator() -> Any:
    """Return accelerate's handle on the processes that run this program together.

    accelerate takes a process on a machine without a GPU for the only one unless it is told that
    CPUs are meant, and then every process would fit for itself.
    """
    accelerate = require("accelerate", extra="training")
    return accelerate.Accelerator(cpu=_is_cpu(), device_placement=False)


def is_main_process() -> bool:
    """Return whether this process writes files and progress; true if it is the only one."""
    return bool(_state().is_main_process)


def find_device() -> str | None:
    """Return the device that the launcher gave this process.

    Returns:
        For instance "cuda:1"; None (the CPU) without a GPU.
    """
    return None if _is_cpu() else str(_state().device)


def _state() -> Any:
    return require("accelerate", extra="training").PartialState(cpu=_is_cpu())


def _is_cpu() -> bool:
    return not torch.accelerator.is_available()
