"""What a process keeps to itself."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from twofold import runtime
if sys.argv[1] == "kept":
    runtime.keep_freed_memory()
    runtime.keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB, 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems keep what is freed in ways of their own")
def test_pages_are_not_fetched_anew_in_every_step():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, timeout=300)
        return int(done.stdout)

    assert 10 * faults("kept") < faults("as usual")  # few of either where pages are huge
