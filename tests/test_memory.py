"""Freed memory that a process keeps: no fresh pages for tensors of any size; what the environment chooses stands."""

import os
import platform
import sys

import pytest

import blocksparse as bs
import processes

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")

CODE = """
import resource, torch, blocksparse

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones({floats}) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(blocksparse.keep_freed_memory())
fresh_pages()
print(fresh_pages())
"""


def environment(**more):
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(chosen)} | more


@glibc
@pytest.mark.parametrize("floats", [2**20, 2**24])  # 4 MB; 64 MB, more than what malloc takes from its heap by itself
def test_a_process_that_keeps_freed_memory_takes_no_fresh_pages(floats):
    done = processes.run([sys.executable, "-c", CODE.format(floats=floats)], env=environment())
    assert done.returncode == 0, done.stderr
    kept, pages = done.stdout.split()
    assert kept == "True"
    assert int(pages) < 1000  # of 20 * 1024 and more, without it nearly all of them


@glibc
@pytest.mark.parametrize(
    "choice",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100"},
        {"LD_PRELOAD": "libmalloc-of-another-kind.so"},  # not there: the loader says so and goes on
    ],
)
def test_what_the_environment_chooses_stands(choice):
    done = processes.run([sys.executable, "-c", CODE.format(floats=2**24)], env=environment(**choice))
    assert done.returncode == 0, done.stderr
    kept, pages = done.stdout.split()
    assert kept == "False"
    assert int(pages) > 10_000


def test_another_malloc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert bs.keep_freed_memory() is False
