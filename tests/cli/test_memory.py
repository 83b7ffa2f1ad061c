"""Freed memory stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

COUNT_FAULTS = """
import resource
from safebridge.cli.memory import keep_freed_memory
{setting}
for _ in range(50):
    bytes(bytearray(1 << 20) * 40)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def count_faults(setting: str, **environment: str) -> int:
    """Return the pages that the system handed out to a process."""
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", COUNT_FAULTS.format(setting=setting)],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


def test_buffers_are_not_fetched_anew() -> None:
    assert count_faults("assert keep_freed_memory()") < count_faults("") / 4


def test_the_users_own_setting_stands() -> None:
    kept = count_faults("assert not keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1048576")
    assert kept > 50 * (40 << 20) / 4096 / 4
