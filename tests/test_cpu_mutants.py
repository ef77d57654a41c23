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

# Every product of layers that take every way through the sources of each folder, on three threads, against float64.
# The latter is computed once; processes forked after that each compile a folder's sources and print what is wrong.
PRODUCTS = """
import os
import sys
import traceback
from pathlib import Path

import torch

import blocksparse as bs
from blocksparse.kernels import cpu_build
from blocksparse.layout import laid_out, memory_format_of

torch.set_num_threads(1)  # no threads yet: they would not survive the fork
torch.manual_seed(0)
flags, *folders = sys.argv[1:]

LAYERS = (  # the largest ones last: a mistake is seen early
    ((16, 16, 3, 3), (8, 8)), ((16, 16, 3, 3), (8, 1)), ((16, 16, 3, 3), (1, 1)), ((12, 6, 1, 1), (4, 2)),
    ((24, 20, 3, 3), (2, 1)), ((24, 20, 3, 3), (1, 1)), ((64, 13, 3, 3), (32, 1)), ((64, 13, 1, 1), (32, 1)),
    ((40, 80, 1, 1), (8, 40)), ((64, 32, 3, 3), (32, 32)), ((64, 48, 3, 3), (1, 1)), ((160, 640, 1, 1), (32, 32)),
)


def case(pattern, values, x, conv, kinds):
    y = bs.reference.fprop(x.double(), values.double(), pattern, None, *conv)
    dy = laid_out(torch.randn(y.shape), memory_format_of(x))
    needed = {"fprop": y}
    needed["dgrad"] = bs.reference.dgrad(dy.double(), values.double(), pattern, x.shape, *conv)
    if "wgrad" in kinds:
        needed["wgrad"] = bs.reference.wgrad(x.double(), dy.double(), pattern, *conv)
    return pattern, values, x, dy, conv, needed


def cases():
    pattern = bs.BSRPattern.random((2, 1, 3, 3), (1, 1), 0.9)
    values = torch.randn(pattern.nnzb, 1, 1)
    for width in range(3, 40):  # every width of a vector's end, of a tensor that begins and ends with a row
        for conv in (1, 0), (1, 1), (2, 0), (2, 1), (2, 2):
            yield case(pattern, values, torch.randn(1, 1, 3, width), conv, ("fprop", "dgrad"))
    for shape, blocksize in LAYERS:
        pattern = bs.BSRPattern.random(shape, blocksize, 0.4)
        values = torch.randn(pattern.nnzb, *blocksize)
        for n, size, conv in (
            (3, 13, (1, shape[2] // 2, 1)), (33, 21, (2, shape[2] // 2, 1)), (2, 9, (1, shape[2] - 1, 2)),
            (7, 5, (1, 0, 1)), (5, 20, ((3, 1), 0, 1)), (2, 15, (1, shape[2] // 2, 1)),
        ):
            for layout in "contiguous", "channels_last", "batch_last":
                x = laid_out(torch.randn(n, shape[1], size, size + 1), layout)
                yield case(pattern, values, x, conv, ("fprop", "dgrad", "wgrad"))


def computed(kind, pattern, values, x, dy, conv):
    if kind == "fprop":
        return bs.conv2d(x, values, pattern, None, *conv, backend="cpu")
    if kind == "dgrad":
        return bs.conv2d_dgrad(dy, values, pattern, x.shape, *conv, backend="cpu")
    return bs.conv2d_wgrad(x, dy, pattern, *conv, backend="cpu")


def wrong():
    for *given, needed in CASES:
        for kind, right in needed.items():
            found = computed(kind, *given)
            if not torch.allclose(found.double(), right, rtol=1e-4, atol=1e-4 * float(right.abs().max() + 1e-9)):
                pattern, _, x, _, conv = given
                return f"{kind} {pattern.shape} {pattern.blocksize} {list(x.shape)} {conv} strides {x.stride()}"
    pattern = bs.BSRPattern.random((32, 32, 3, 3), (8, 8), 0.4)
    many = pattern, torch.randn(pattern.nnzb, 8, 8), torch.randn(64, 32, 20, 20), None, (1, 1)  # many tasks
    needed = computed("fprop", *many)
    if not all(torch.equal(computed("fprop", *many), needed) for _ in range(40)):
        return "fprop: not the same bits"


CASES = list(cases())
for folder in map(Path, folders):
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        (folder / "status").write_text(str(status))
        continue
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    cpu_build.SOURCES = folder / "native"
    cpu_build.FLAGS = tuple(flag for flag in cpu_build.FLAGS if flag != "-O2") + tuple(flags.split())
    torch.set_num_threads(3)
    try:
        if isinstance(why := cpu_build.library("float"), str):
            print("not compiled:", why, flush=True)
            os._exit(0)
        why = wrong()
        print("right" if why is None else f"wrong: {why}", flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
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


# What reads or writes outside of a tensor.
STRAYING = {
    "one-row-too-many": ("if (h < 0 || h >= vertical.size) {", "if (h < 0 || h > vertical.size) {"),
    "one-pixel-behind-the-last": (
        "(inside - 1) * from_step + offset + reach",
        "(inside - 1) * from_step + offset + reach - 1",
    ),
    "one-pixel-before-the-first": ("from - begin + offset < 0", "from - begin + offset < -1"),
    "a-channel-behind-the-last": (
        "image + blocks[number].most + READ <= end",
        "image + blocks[number].most + READ <= end + 1",
    ),
}


def mutant(folder: Path, before: str, after: str) -> None:
    """A copy of the sources with a mistake wherever the text is."""
    sources = shutil.copytree(SOURCES, folder / "native")
    files = [file for file in sources.iterdir() if before in file.read_text()]
    assert files, before
    for file in files:
        file.write_text(file.read_text().replace(before, after))


def products(folders: list[Path], cache: Path, flags: str, **environment: str) -> list[tuple[int, str]]:
    """Of each folder's sources: how the process ended, and what it printed."""
    threads = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}  # maybe more than cores: none waits busily
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **threads, **environment}
    result = processes.run([sys.executable, "-c", PRODUCTS, flags, *map(str, folders)], env=env, limit=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    return [(int((folder / "status").read_text()), (folder / "said").read_text()) for folder in folders]


def planted(mistakes: dict[str, tuple[str, str]], request, folder: Path) -> list[Path]:
    """A folder for each of the mistakes that this run asks for."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in here if "name" in item.fixturenames}
    folders = [folder / name for name in mistakes if name in asked]
    for made in folders:
        mutant(made, *mistakes[made.name])
    return folders


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """How the sources with each of MUTANTS ended, and what they printed."""
    folder = tmp_path_factory.mktemp("mutants")
    folders = planted(MUTANTS, request, folder)
    return {at.name: how for at, how in zip(folders, products(folders, folder, "-O0 -DPOISON"), strict=True)}


@pytest.fixture(scope="module")
def checked(request, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The same of the sources as they stand, and with each of STRAYING, under the address sanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    runtime = processes.run([compiler, "-print-file-name=libasan.so"]).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ without its address sanitizer")
    folder = tmp_path_factory.mktemp("checked")
    shutil.copytree(SOURCES, folder / "as-they-stand" / "native")
    folders = [folder / "as-they-stand", *planted(STRAYING, request, folder)]
    flags = "-O0 -fsanitize=address -fno-omit-frame-pointer -DPOISON"  # compiled in a fifth of the time that -O1 takes
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "CXX": compiler}
    return {at.name: how for at, how in zip(folders, products(folders, folder, flags, **options), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_seen(name, outcomes):
    status, said = outcomes[name]
    assert status != 0 or said.startswith("wrong: "), said


@pytest.mark.slow
def test_no_read_or_write_outside_of_a_tensor(checked):
    assert checked["as-they-stand"] == (0, "right\n"), checked["as-they-stand"][1][-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRAYING)
def test_a_read_or_write_outside_of_a_tensor_is_seen(name, checked):
    assert "AddressSanitizer" in checked[name][1], checked[name][1][-3000:]
