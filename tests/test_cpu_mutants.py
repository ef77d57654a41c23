"""The native CPU backend under a memory checker, and with planted mistakes, each of which must be seen."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "blocksparse" / "kernels" / "native"

# Every product of layers that take every way through the source, on three threads, against float64.
PRODUCTS = """
import sys
import torch
import blocksparse as bs
from blocksparse.kernels import cpu_build
from blocksparse.layout import laid_out
from pathlib import Path

source, optimise, *more = sys.argv[1:]
cpu_build.SOURCE = Path(source)
cpu_build.FLAGS = (*(optimise if flag == "-O2" else flag for flag in cpu_build.FLAGS), *more)
torch.set_num_threads(3)
torch.manual_seed(0)


def check(right, *what):
    if not right:
        print("wrong:", *what)
        sys.exit()


LAYERS = (  # the largest ones last: a mistake is seen early
    ((16, 16, 3, 3), (8, 8)), ((16, 16, 3, 3), (8, 1)), ((16, 16, 3, 3), (1, 1)), ((12, 6, 1, 1), (4, 2)),
    ((24, 20, 3, 3), (2, 1)), ((24, 20, 3, 3), (1, 1)), ((64, 13, 3, 3), (32, 1)), ((64, 13, 1, 1), (32, 1)),
    ((40, 80, 1, 1), (8, 40)), ((64, 32, 3, 3), (32, 32)), ((64, 48, 3, 3), (1, 1)), ((160, 640, 1, 1), (32, 32)),
)
pattern = bs.BSRPattern.random((2, 1, 3, 3), (1, 1), 0.9)
values = torch.randn(pattern.nnzb, 1, 1)
for width in range(3, 40):  # every width of a vector's end, of a tensor that begins and ends with a row
    for stride, padding in (1, 0), (1, 1), (2, 0), (2, 1), (2, 2):
        x = torch.randn(1, 1, 3, width)
        y = bs.conv2d(x, values, pattern, None, stride, padding, backend="cpu")
        dx = bs.conv2d_dgrad(y, values, pattern, x.shape, stride, padding, backend="cpu")
        needed = bs.reference.fprop(x.double(), values.double(), pattern, None, stride, padding)
        needed_dx = bs.reference.dgrad(y.double(), values.double(), pattern, x.shape, stride, padding)
        check(torch.allclose(y.double(), needed, rtol=1e-4, atol=1e-5), "fprop", "width", width, stride, padding)
        check(torch.allclose(dx.double(), needed_dx, rtol=1e-4, atol=1e-4), "dgrad", "width", width, stride, padding)
for shape, blocksize in LAYERS:
    pattern = bs.BSRPattern.random(shape, blocksize, 0.4)
    values = torch.randn(pattern.nnzb, *blocksize)
    for n, size, conv in (
        (3, 13, (1, shape[2] // 2, 1)), (33, 21, (2, shape[2] // 2, 1)), (2, 9, (1, shape[2] - 1, 2)),
        (7, 5, (1, 0, 1)), (5, 20, ((3, 1), 0, 1)), (2, 15, (1, shape[2] // 2, 1)),
    ):
        for layout in "contiguous", "channels_last", "batch_last":
            x = laid_out(torch.randn(n, shape[1], size, size + 1), layout)
            y = bs.conv2d(x, values, pattern, None, *conv, backend="cpu")
            dy = torch.randn_like(y)
            found = [
                y,
                bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend="cpu"),
                bs.conv2d_wgrad(x, dy, pattern, *conv, backend="cpu"),
            ]
            needed = [
                bs.reference.fprop(x.double(), values.double(), pattern, None, *conv),
                bs.reference.dgrad(dy.double(), values.double(), pattern, x.shape, *conv),
                bs.reference.wgrad(x.double(), dy.double(), pattern, *conv),
            ]
            for kind, a, b in zip(("fprop", "dgrad", "wgrad"), found, needed):
                right = torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max() + 1e-9))
                check(right, kind, shape, blocksize, n, size, conv, layout)
pattern = bs.BSRPattern.random((32, 32, 3, 3), (8, 8), 0.4)
values, x = torch.randn(pattern.nnzb, 8, 8), torch.randn(64, 32, 20, 20)
for i in range(40):  # many tasks for several threads
    y = bs.conv2d(x, values, pattern, None, 1, 1, backend="cpu")
    needed = y if i == 0 else needed
    check(torch.equal(y, needed), "fprop", "not the same bits")
print("right")
"""

MUTANTS = {
    "a-chunk-forgets-the-one-before": ("chunk ? nullptr : start(b) + f", "start(b) + f"),
    "a-chunk-of-rows-begins-again": ("next[list] = starts[list];", "next[list] = starts[0];"),
    "a-chunk-of-weights-twice": ("lists + b * (cut.count + 1) + chunk;", "lists + b * (cut.count + 1);"),
    "pitch-off-by-one": (
        "pitch = std::max(horizontal.length, (g.w - 1 + g.padding[1]) / g.stride[1] + 1);",
        "pitch = std::max(horizontal.length, (g.w - 1 + g.padding[1]) / g.stride[1] + 1) - 1;",
    ),
    "a-row-runs-into-the-next": ("at < lead + data", "at <= lead + data"),
    "no-zeros-between-transposed-rows": ("left |= pitch - horizontal.data[b] > over;", ""),
    "no-zeros-before-transposed-rows": ("(top < bottom ? horizontal.lead[b] : 0)", "0"),
    "the-last-of-an-odd-row": ("even + half + 1", "even + half"),
    "missing-tail": ("exact ? run / L : (run + L - 1) / L", "run / L"),
    "no-room-for-rows-that-nothing-reads": (
        "std::max(std::min(lay.rows + reach, g.p), lay.rows) + reach",
        "std::min(lay.rows + reach, g.p) + reach",
    ),
    "missing-last-vector-in-place": ("if (exact && run % L) body(run - L, 1);", ""),
    "rows-of-batch-last-as-if-contiguous": (" + u.row * g.x_strides[2]", " + u.row * g.w"),
    "images-of-batch-last-not-padded": ("copy_pixels<true>", "copy_pixels<false>"),
    "columns-of-batch-last-side-by-side": ("horizontal.shift[s] * pixel_step", "horizontal.shift[s]"),
    "windows-of-batch-last-overlap": ("some.rows * images * pitch", "some.rows * images * pitch + 1"),
    "threads-share-planes": ("scratch.at<A>(own_at) + thread * size", "scratch.at<A>(own_at)"),
    "a-pixel-beyond-the-image": ("source < (backward ? out : in)", "source <= (backward ? out : in)"),
    "every-tap-in-every-phase": ("if (backward && (first + padding - tap * dilation) % stride != 0) continue;", ""),
    "sums-of-64-forgotten": ("held ? load(to) + sum[p][v] : sum[p][v]", "sum[p][v]"),
    "the-last-pixel-of-a-row-twice": ("if (j < columns) add(p, q);", "add(p, q);"),
    "an-output-beyond-the-last-tap": ("(in - shift + stride - 1) / stride : 0", "(in - shift) / stride + 1 : 0"),
    "rows-that-do-not-fit": ("if (pixels % some == 0 && ", "if ("),
    "threads-share-a-table": ("scratch.at<const A*>(own_at) + THREAD * own_pointers", "scratch.at<const A*>(own_at)"),
    "pixels-beside-the-image-count": ("masked<A, L>(block[j], mask_at<A, L>(&held[(position + j) * L]))", "block[j]"),
    "a-lane-after-the-last": ("if (i >= total) return {-1, {0, 0}};", ""),
    "taps-of-dx-not-turned": ("vertical.reach - i, horizontal.reach - j", "i, j"),
    "rows-of-a-tile-once": ("p[i] += piece.x_step;", "p[i] += 0;"),
    "shares-have-one-sum": ("A* const sum = sums + share * weights;", "A* const sum = sums;"),
}


def products(source: Path, cache: Path, *flags: str, **environment: str):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "3", **environment}
    return processes.run([sys.executable, "-c", PRODUCTS, str(source), *flags], env=env)


def mutant(folder: Path, before: str, after: str) -> Path:
    """A copy of the sources with a mistake wherever the text is."""
    sources = shutil.copytree(SOURCES, folder / "native")
    files = [file for file in sources.iterdir() if before in file.read_text()]
    assert files, before
    for file in files:
        file.write_text(file.read_text().replace(before, after))
    return sources / "cpu.cpp"


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_seen(name, tmp_path):
    result = products(mutant(tmp_path, *MUTANTS[name]), tmp_path, "-O0", "-DPOISON")
    assert result.returncode != 0 or result.stdout.startswith("wrong: ")


@pytest.mark.slow
def test_no_read_or_write_outside_of_a_tensor(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    runtime = processes.run([compiler, "-print-file-name=libasan.so"]).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ without its address sanitizer")
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "CXX": compiler}
    flags = "-O1", "-fsanitize=address", "-fno-omit-frame-pointer", "-DPOISON"
    result = products(SOURCES / "cpu.cpp", tmp_path, *flags, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "right\n", result.stdout
    # It looks: one row of an image too many is read; one pixel behind the last, one before the first. These end early,
    # and compile in a third of the time without optimisation.
    for i, (before, after) in enumerate((
        ("if (h < 0 || h >= vertical.size) {", "if (h < 0 || h > vertical.size) {"),
        ("(inside - 1) * from_step + offset + reach", "(inside - 1) * from_step + offset + reach - 1"),
        ("from - begin + offset < 0", "from - begin + offset < -1"),
        ("image + blocks[number].most + READ <= end", "image + blocks[number].most + READ <= end + 1"),
    )):  # fmt: skip
        result = products(mutant(tmp_path / str(i), before, after), tmp_path, "-O0", *flags[1:], **options)
        assert "AddressSanitizer" in result.stderr, before
