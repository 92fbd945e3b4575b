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


KEPT = """
import resource
import torch
from twofold import runtime

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

runtime.keep_freed_memory()
before = resident()
held = torch.ones(64 * 2**20)  # 256 MiB
del held
kept = resident() - before
runtime.give_memory_back()
print(kept, resident() - before)
"""
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not GLIBC, reason="other systems keep what is freed in ways of their own")
def test_pages_are_not_fetched_anew_in_every_step():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, timeout=300)
        return int(done.stdout)

    assert 10 * faults("kept") < faults("as usual")  # few of either where pages are huge


@pytest.mark.skipif(not GLIBC, reason="other systems keep what is freed in ways of their own")
def test_what_is_kept_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, timeout=300)
    kept, left = map(float, done.stdout.split())
    assert kept > 200 and left < 30
