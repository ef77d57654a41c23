"""The emulator runs right kernels right, and catches each kind of wrong one: a planted bug for every rule it keeps."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import emulator
from emulator import FAST, EmulatorError

SEEDS = range(8)


def run(text: str, *args, threads=64, shared=1024, ctas=1, seed=0, flags=FAST) -> None:
    emulator.launch(emulator.build(text, flags)["kernel"], "kernel", ctas, threads, shared, args, seed)


def right(text: str, *args, **options) -> bool:
    """Whether the kernel gives 0, 1, 2, ... for every seed."""
    out = args[-1]
    for seed in SEEDS:
        out.fill_(float("nan"))
        run(text, *args, seed=seed, **options)
        if not torch.equal(out, torch.arange(out.numel(), dtype=out.dtype)):
            return False
    return True


def numbers(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)


# ---------------------------------------------------------------------- barriers

REVERSED_TWICE = """
extern "C" __global__ void kernel(const float* in, float* out) {
    float* s = (float*)shared;
    s[63 - threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    const float v = s[(63 - threadIdx.x) ^ 5];
    __syncthreads();
    s[threadIdx.x ^ 5] = v;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x] + 64 * blockIdx.x;
}
"""


def without(text: str, what: str, which: int) -> str:
    """`text` less the occurrence number `which` of `what`."""
    at = [m.start() for m in re.finditer(re.escape(what), text)][which]
    return text[:at] + text[at + len(what) :]


def test_barriers_hold():
    assert right(REVERSED_TWICE, numbers(64), torch.empty(64))
    assert right(REVERSED_TWICE, numbers(64), torch.empty(192), ctas=3)


@pytest.mark.parametrize("which", range(3))
def test_a_missing_barrier_shows(which):
    assert not right(without(REVERSED_TWICE, "__syncthreads();", which), numbers(64), torch.empty(64))


def test_lanes_of_a_warp_do_not_run_in_step():
    """What one lane writes another may read only behind a barrier, in the same warp too."""
    text = """
extern "C" __global__ void kernel(const float* in, float* out) {
    ((float*)shared)[threadIdx.x ^ 1] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x ^ 1] = ((float*)shared)[threadIdx.x];
}
"""
    assert right(text, numbers(32), torch.empty(32), threads=32)
    assert not right(without(text, "__syncthreads();", 0), numbers(32), torch.empty(32), threads=32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 63) __syncthreads();", "deadlock: 63 threads wait at __syncthreads.*1 have left"),
        ("if (threadIdx.x % 2)\n__syncthreads();\nelse\n__syncthreads();", "while others wait at that of line"),
        ("if (threadIdx.x % 32) __ballot_sync(~0u, true);", "deadlock: .* 62 at an operation of their warp"),
        (
            "if (threadIdx.x % 2) __ballot_sync(~0u, true); else __shfl_sync(~0u, 1, 0);",
            "the lanes of a warp meet at different operations",
        ),
    ],
)
def test_operations_that_not_all_reach(body, message):
    with pytest.raises(EmulatorError, match=message):
        run(f'extern "C" __global__ void kernel(float* out) {{ {body} }}', torch.empty(1))


def test_threads_run_in_another_order_at_every_seed():
    text = """
extern "C" __global__ void kernel(int* next, int* order) {
    order[(*next)++] = blockIdx.x * 64 + threadIdx.x;
}
"""
    orders = set()
    for seed in SEEDS:
        order = torch.zeros(128, dtype=torch.int32)
        run(text, torch.zeros(1, dtype=torch.int32), order, ctas=2, seed=seed)
        assert sorted(order.tolist()) == list(range(128))
        orders.add(tuple(order.tolist()))
    assert len(orders) == len(SEEDS)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("access", "seed"),
    [("in[i + 1]", 0), ("in[i - 1]", 1)],  # even seeds put buffers in front of a page that faults, odd ones behind it
)
def test_an_off_by_one_read_is_caught(access, seed):
    text = 'extern "C" __global__ void kernel(const float* in, float* out) { const int i = threadIdx.x; out[i] = %s; }'
    assert right(text % "in[i]", numbers(64), torch.empty(64))
    with pytest.raises(EmulatorError, match="out of bounds"):
        run(text % access, numbers(64), torch.empty(64), seed=seed)


def test_an_off_by_one_write_is_caught():
    text = 'extern "C" __global__ void kernel(float* out) { out[threadIdx.x + 1] = threadIdx.x; }'
    with pytest.raises(EmulatorError, match="out of bounds"):
        run(text, torch.empty(64), seed=0)


def test_a_write_past_shared_memory_is_caught():
    text = """
extern "C" __global__ void kernel(float* out) {
    ((float*)shared)[threadIdx.x + %d] = 0;
    out[threadIdx.x] = threadIdx.x;
}
"""
    assert right(text % 0, torch.empty(64), shared=256)
    with pytest.raises(EmulatorError, match="out of bounds"):
        run(text % 1, torch.empty(64), shared=256)


def test_memory_up_to_the_next_16_bytes_is_nan():
    text = 'extern "C" __global__ void kernel(const float* in, float* out) { out[threadIdx.x] = in[61]; }'
    out = torch.zeros(32)
    run(text, numbers(61), out, threads=32)
    assert out.isnan().all()


def test_an_unwritten_output_shows():
    text = 'extern "C" __global__ void kernel(float* out) { if (threadIdx.x != 40) out[threadIdx.x] = threadIdx.x; }'
    assert right(text.replace("!= 40", "!= 64"), torch.empty(64))
    assert not right(text, torch.empty(64))


def test_shared_memory_that_nobody_wrote_is_nan():
    text = """
extern "C" __global__ void kernel(float* out) {
    if (blockIdx.x == %d) ((float*)shared)[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = ((float*)shared)[threadIdx.x];
}
"""
    assert right(text % 0, torch.empty(64))
    out = torch.zeros(64)
    run(text % 1, out)
    assert out.isnan().all()


PLANTED = [  # statements, and what the sanitizers say: in has 61 floats, out 64 ints, shared memory 244 bytes
    ("out[i] = i;", ""),
    ("((float*)shared)[i] = in[i]; ((float*)shared)[i + 29] = in[i + 29];", ""),
    ("out[i] = (int)in[i + 30];", "heap-buffer-overflow.*READ of size 4"),
    ("out[i] = (int)in[i - 1];", "heap-buffer-overflow.*READ of size 4"),
    ("out[i + 33] = i;", "heap-buffer-overflow.*WRITE of size 4"),
    ("out[i - 1] = i;", "heap-buffer-overflow.*WRITE of size 4"),
    ("out[i] = shared[213 + i];", "heap-buffer-overflow.*READ of size 1"),
    ("shared[213 + i] = 1;", "heap-buffer-overflow.*WRITE of size 1"),
    ("shared[i - 1] = 1;", "heap-buffer-overflow.*WRITE of size 1"),
    ("*(float*)(shared + i * 4 + 1) = 1;", "store to misaligned address"),
    ("int a[4] = {}; a[i / 8] = i; __syncthreads(); out[i] = a[i / 8];", ""),
    ("int a[4] = {}; a[i / 7] = i; __syncthreads(); out[i] = a[i / 7];", r"out of bounds for type 'int \[4\]'"),
    ("out[i] = 2147483616 + i;", ""),
    ("out[i] = 2147483617 + i;", "signed integer overflow"),
]


@pytest.mark.slow
def test_the_sanitizers_catch_what_pages_do_not():
    """To the byte and on both sides, at any seed."""
    choice = " ".join(f"if (which == {i}) {{ {statements} }}" for i, (statements, _) in enumerate(PLANTED))
    arguments = "const float* in, int* out, const int which"
    text = f'extern "C" __global__ void kernel({arguments}) {{ const int i = threadIdx.x; {choice} }}'
    prelude = f"""
import numpy, torch, emulator
kernel = emulator.build({text!r}, emulator.CHECKED)["kernel"]
def run(which):
    args = torch.ones(61), torch.zeros(64, dtype=torch.int32), numpy.int32(which)
    for seed in range(2):
        emulator.launch(kernel, "kernel", 2, 32, 244, args, seed)
"""
    said = emulator.sanitized([f"run({i})" for i in range(len(PLANTED))], prelude)
    for (statements, message), found in zip(PLANTED, said, strict=True):
        assert bool(found) == bool(message), (statements, found)
        assert re.search(message, found, re.DOTALL), (statements, found)


# ---------------------------------------------------------------------- asynchronous copies

COPIED = """
extern "C" __global__ void kernel(const float* in, float* out) {
    cp_async<4>(shared + threadIdx.x * 4, in + threadIdx.x);
    cp_async_wait();
    __syncthreads();
    out[threadIdx.x ^ 33] = ((float*)shared)[threadIdx.x ^ 33];
}
"""


def test_copies_arrive_at_the_wait():
    assert right(COPIED, numbers(64), torch.empty(64))


@pytest.mark.parametrize("lost", ["cp_async_wait();", "__syncthreads();"])
def test_an_unwaited_copy_shows(lost):
    assert not right(COPIED.replace(lost, ""), numbers(64), torch.empty(64))


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("cp_async<16>(shared + threadIdx.x * 4, in)", "cp.async: .* no multiple of 16"),
        ("cp_async<8>(shared + threadIdx.x * 8, in + 1)", "cp.async: a global address that is no multiple of 8"),
        ("cp_async<16>(shared + 1024 + threadIdx.x * 16, in)", "cp.async: an address outside shared memory"),
    ],
)
def test_bad_copies_are_caught(copy, message):
    with pytest.raises(EmulatorError, match=message):
        run(f'extern "C" __global__ void kernel(const float* in) {{ {copy}; }}', numbers(64))


# ---------------------------------------------------------------------- tensor-core instructions

MMA = """
#define MATH %s
constexpr int K = %d, SIZE = %d;
extern "C" __global__ void kernel(const unsigned char* a, const unsigned char* b, const float* c, float* out) {
    const int lane = threadIdx.x, ROW = K * SIZE;  // a is [16, K], b is [8, K]: both lie along K
    for (int i = lane; i < 24 * ROW; i += 32) shared[i] = i < 16 * ROW ? a[i] : b[i - 16 * ROW];
    __syncthreads();
    unsigned fa[4], fb[4];
    ldmatrix4(fa, shared + lane %% 16 * ROW + lane / 16 * 16);
    ldmatrix4(fb, shared + (16 + lane %% 8) * ROW + lane / 8 %% 2 * 16);
    const unsigned two[2] = {fb[0], fb[1]};
    const int row = lane / 4, column = lane %% 4 * 2;
    float d[4] = {c[row * 8 + column], c[row * 8 + column + 1], c[row * 8 + 64 + column], c[row * 8 + 64 + column + 1]};
    mma(d, fa, two);
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i %% 2] = d[i];
}
"""


@pytest.mark.parametrize(
    ("math", "dtype", "k"), [("FP16", torch.float16, 16), ("BF16", torch.bfloat16, 16), ("TF32", torch.float32, 8)]
)
def test_mma_is_the_product_of_its_fragments(math, dtype, k):
    """Layouts as in the PTX manual's figures, which ldmatrix's rows of 16 bytes fill."""
    a, b, c, out = torch.randn(16, k), torch.randn(8, k), torch.randn(16, 8), torch.empty(16, 8)
    if math == "TF32":
        a, b = (torch.from_numpy((t.numpy().view(np.uint32) & 0xFFFFE000).view(np.float32)) for t in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    run(MMA % (math, k, dtype.itemsize), a, b, c, out, threads=32, shared=24 * k * dtype.itemsize)
    torch.testing.assert_close(out, c + a.float() @ b.float().T)


def test_ldmatrix_trans_is_the_transpose():
    text = """
extern "C" __global__ void kernel(const unsigned* in, unsigned* out) {
    for (int i = threadIdx.x; i < 128; i += 32) ((unsigned*)shared)[i] = in[i];
    __syncthreads();
    unsigned d[4];
    ldmatrix4_trans(d, shared + threadIdx.x * 16);
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = d[i];
}
"""
    given, out = torch.arange(256, dtype=torch.int16), torch.empty(256, dtype=torch.int16)
    run(text, given, out, threads=32, shared=512)
    assert torch.equal(out.view(4, 8, 8), given.view(4, 8, 8).transpose(1, 2))


@pytest.mark.parametrize("branch", ["if (lane < 5) {\n    LOAD\n  } else {\n    LOAD\n  }", "UNROLLED"])
def test_an_aligned_operation_that_lanes_come_to_by_different_ways_is_caught(branch):
    """On a GPU that is undefined; a warp meets at one instruction, not at two alike."""
    load = "ldmatrix4(d[0], shared + lane * 16);"
    if branch == "UNROLLED":
        load, branch = "ldmatrix4(d[i], shared + lane * 16);", "const int i = lane < 5;\n  LOAD"
    text = f"""
extern "C" __global__ void kernel(float* out) {{
  const int lane = threadIdx.x;
  unsigned d[2][4];
  {branch.replace("LOAD", load)}
  out[lane] = d[lane < 5][0];
}}
"""
    with pytest.raises(EmulatorError, match=r"an \.aligned operation while lanes of the warp wait at another"):
        run(text, torch.empty(32), threads=32)


def test_misaligned_rows_are_caught():
    text = 'extern "C" __global__ void kernel(float* out) { unsigned d[4]; ldmatrix4(d, shared + threadIdx.x * 8); }'
    with pytest.raises(EmulatorError, match=r"ldmatrix: .* no multiple of 16"):
        run(text, torch.empty(1))


def test_conversions_round_as_torch_does():
    text = """
#define MATH %s
extern "C" __global__ void kernel(const float* in, unsigned short* out, float* back) {
    out[threadIdx.x] = from_float(in[threadIdx.x]);
    back[threadIdx.x] = to_float(out[threadIdx.x]);
}
"""
    given = torch.cat([torch.randn(29), torch.tensor([float("inf"), -0.0, 1e-7])])
    for math, dtype in (("FP16", torch.float16), ("BF16", torch.bfloat16)):
        out, back = torch.empty(32, dtype=dtype), torch.empty(32)
        run(text % math, given, out, back, threads=32)
        assert torch.equal(out, given.to(dtype))
        assert torch.equal(back, given.to(dtype).float())
