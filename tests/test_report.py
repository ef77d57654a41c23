"""report: every figure against its definition, counted one cell at a time, and against what torch.save writes."""

from __future__ import annotations

import io
import itertools
import math
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blocksparse import BSRConv2d, BSRLinear, BSRPattern
from hrbp import load, save, sparsify
from hrbp.formats.weights import read_weights
from hrbp.reports.dgrad import dgrad_fill, dgrad_ratio
from hrbp.reports.mask_report import report_mask
from hrbp.reports.model_report import report_model, table
from hrbp.reports.score import Score, random_groups, total_score
from hrbp.reports.stream import stream
from hrbp.structures.base import Selection
from hrbp.structures.grouping import Grouping
from hrbp.structures.recognise import describe, grain, recognise, stored_blocks
from hrbp.structures.registry import choose
from hrbp.structures.regrouping import regroup
from hrbp.structures.selection import top
from strategies import patterns

# structure, options, sparsity, description (None: depends on what was drawn)
STRUCTURES = [
    ("unstructured", {}, 0.9, "single weights"),
    ("n:m", {"m": 4}, 0.75, "1:4"),
    ("vector", {}, 0.9, "vectors"),
    ("kernel", {}, 0.9, "kernels"),
    ("filter", {}, 0.9, "filters"),
    ("channel", {}, 0.9, "channels"),
    ("block", {"blocksize": (8, 4)}, 0.9, "blocks 8x4"),
    ("1xn", {"n": 8}, 0.9, "blocks 8x1 of all taps"),
    ("elementwise", {"groups": 4}, 0.9, "element-wise groups of 8"),
    ("hrbp", {"groups": 4}, 0.75, "4 groups of 8: 4 of 16 channels, 9 of 9 taps"),
    ("hrbp++", {"groups": 4}, 0.75, "4 groups of 8: 9 of 16 channels, 4 of 9 taps"),
]
SHAPE = (32, 16, 3, 3)


def scores(seed, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


small_masks = st.builds(
    lambda k, c, r, s, density, seed: torch.rand(k, c, r, s, generator=torch.Generator().manual_seed(seed)) < density,
    *[st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)],
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
)


# ---------------------------------------------------------------- dense rectangles in the input gradient


def fill_by_hand(mask, blocks):
    """Share of bounding rectangles in W' that is filled; `blocks` are sets of kept cells (k, c, i, j)."""
    k, _, r, s = mask.shape
    filled = area = 0
    for cells in blocks:
        # W'[c, ((r-1-i)*s + (s-1-j))*K + k] = W[k, c, i, j]
        places = {(c, ((r - 1 - i) * s + (s - 1 - j)) * k + o) for o, c, i, j in cells}
        filled += len(places)
        area += len({row for row, _ in places}) * len({col for _, col in places})
    return filled / area if area else 1.0


def equal_filters(mask):
    """Kept cells of each set of filters with equal masks."""
    groups = {}
    for cell in mask.nonzero().tolist():
        groups.setdefault(tuple(mask[cell[0]].flatten().tolist()), set()).add(tuple(cell))
    return groups.values()


@given(small_masks)
def test_dgrad_fill_is_counted_cell_by_cell(mask):
    assert dgrad_fill(Selection(mask, (1, 1))) == pytest.approx(fill_by_hand(mask, equal_filters(mask)), abs=1e-12)


@given(patterns(), st.integers(0, 99))
def test_dgrad_fill_of_stored_blocks(pattern, seed):
    """Blocks with holes: a pattern's blocks are rectangles of W whatever part of them is kept."""
    mask = pattern.to_mask() & (torch.rand(pattern.shape, generator=torch.Generator().manual_seed(seed)) < 0.7)
    bk, bc = pattern.blocksize
    order = torch.arange(pattern.shape[0]) if pattern.row_order is None else pattern.row_order
    row_of = {filter: row for row, filter in enumerate(order.tolist())}
    blocks = {}
    for o, c, i, j in mask.nonzero().tolist():
        blocks.setdefault((row_of[o] // bk, c // bc, i, j), set()).add((o, c, i, j))
    choice = Selection(mask, pattern.blocksize, pattern.row_order)
    expected = blocks.values() if bk > 1 and bc > 1 else equal_filters(mask)
    assert dgrad_fill(choice) == pytest.approx(fill_by_hand(mask, expected), abs=1e-12)


@pytest.mark.parametrize(("name", "options", "sparsity", "_"), STRUCTURES, ids=lambda v: str(v))
def test_which_structures_stay_dense_in_dgrad(name, options, sparsity, _):
    for seed in range(5):
        fill = report_mask(choose(scores(seed), sparsity, name, **options)).dgrad_fill
        if name in ("unstructured", "n:m", "vector", "elementwise"):
            assert fill < 0.6
        else:
            assert fill == 1.0


def test_pointwise_kernels_lose_nothing():
    """W' is W transposed when R = S = 1: element-wise groups stay rectangles there, and only there."""
    flat = choose(scores(0, (32, 64, 1, 1)), 0.8, "elementwise", groups=4)
    assert dgrad_fill(flat) == 1.0


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize(("name", "options", "sparsity", "words"), STRUCTURES, ids=lambda v: str(v))
def test_structures_are_recognised_from_the_mask_alone(name, options, sparsity, words):
    made = choose(scores(3), sparsity, name, **options)
    seen = recognise(made.mask)
    assert describe(made) == describe(seen) == words
    pattern = BSRPattern.from_mask(seen.mask, seen.blocksize, seen.row_order)
    assert torch.equal(pattern.to_mask(), made.mask)
    known, found = report_mask(made), report_mask(made.mask)
    assert (known.kept, known.stored, known.dgrad_fill) == (found.kept, found.stored, found.dgrad_fill)
    assert found.kept == found.stored == int(made.mask.sum())


@given(small_masks)
def test_what_is_recognised_stores_no_zero(mask):
    report = report_mask(mask)
    assert report.kept == int(mask.sum())
    assert report.density == report.kept / mask.numel()
    assert report.stored == report.kept
    seen = recognise(mask)
    if seen.grouping is not None:
        assert torch.equal(seen.grouping.mask(), mask)


def test_dense_empty_and_linear():
    assert report_mask(torch.ones(4, 6, dtype=torch.bool)).structure == "dense"
    assert report_mask(torch.zeros(4, 6, 3, 3, dtype=torch.bool)).structure == "empty"
    linear = report_mask(torch.eye(6, dtype=torch.bool))
    assert (linear.shape, linear.structure, linear.dgrad_fill) == ((6, 6, 1, 1), "single weights", 1.0)


@given(small_masks)
def test_grain_is_the_largest_uniform_box(mask):
    def uniform(box):
        sizes = [n for axis, size in zip(mask.shape, box, strict=True) for n in (axis // size, size)]
        cells = mask.reshape(sizes)
        return bool((cells.amax((1, 3, 5, 7)) == cells.amin((1, 3, 5, 7))).all())

    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in mask.shape]
    best = max((box for box in itertools.product(*divisors) if uniform(box)), key=math.prod)
    assert grain(mask) == best


def test_grain_in_the_order_of_rows():
    made = choose(scores(1), 0.75, "hrbp", groups=4)
    assert report_mask(made).grain[0] % 8 == 0
    assert grain(made.mask)[0] < 8


# ---------------------------------------------------------------- score


@pytest.mark.parametrize(("name", "options", "sparsity", "_"), STRUCTURES, ids=lambda v: str(v))
def test_score_is_the_definition(name, options, sparsity, _):
    score = scores(5)
    made = choose(score, sparsity, name, **options)
    found = report_mask(made, score).score
    ranked = sorted(score.flatten().tolist(), reverse=True)
    kept = math.fsum(v for v, m in zip(score.flatten().tolist(), made.mask.flatten().tolist(), strict=True) if m)
    assert found.total == pytest.approx(math.fsum(ranked))
    assert found.kept == pytest.approx(kept)
    assert found.unstructured == pytest.approx(math.fsum(ranked[: int(made.mask.sum())]))
    assert found.retained == pytest.approx(kept / math.fsum(ranked))
    assert found.of_unstructured <= 1 + 1e-12
    assert (found.random is None) == (name not in ("hrbp", "hrbp++"))
    if name == "unstructured":
        assert found.of_unstructured == pytest.approx(1.0)


def test_random_groups_have_their_best_channels_and_taps():
    """Every choice of channels and taps for the same rows, tried out: alternation is at most a little below."""
    score = scores(0, (8, 5, 2, 2))
    like = Grouping((8, 5, 2, 2), torch.arange(8), torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [1, 2]]))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    best = 0.0
    for rows in order.view(2, 4):
        sums = score[rows].sum(0).view(5, 4)
        best += max(
            float(sums[list(ch)][:, list(taps)].sum())
            for ch in itertools.combinations(range(5), 2)
            for taps in itertools.combinations(range(4), 2)
        )
    found = random_groups(score, like, seed=4, draws=1)
    assert 0.97 * best <= found <= best * (1 + 1e-12)


def test_random_groups_move_whole_runs_of_channels():
    score = torch.zeros(4, 4, 1, 1, dtype=torch.float64)
    score[:, 1] = score[:, 2] = 1.0
    made = Grouping((4, 4, 1, 1), torch.arange(4), torch.tensor([[0, 1]]), torch.tensor([[0]]), granule=2)
    assert random_groups(score, made) == 4.0  # one of two runs, not the two channels across them


@pytest.mark.parametrize("seed", range(3))
def test_efficacy_is_zero_by_chance_and_grows_with_the_search(seed):
    score = scores(seed)
    random = Grouping.from_mask(choose(torch.ones(SHAPE), 0.75, "hrbp++", groups=4).mask)
    found = regroup(score, 0.75, groups=4, tap_density=4 / 9)
    report = report_mask(Selection(found.mask(), found.blocksize, found.row_order, found), score).score
    assert 0 < report.efficacy < 1
    assert Score(10.0, 4.0, 8.0, 4.0).efficacy == 0
    assert Score(10.0, 8.0, 8.0, 4.0).efficacy == 1
    assert Score(10.0, 5.0, 8.0, 4.0).efficacy == 0.25
    assert Score(10.0, 8.0, 8.0, 8.0).efficacy is None
    assert Score(10.0, 8.0, 8.0, None).efficacy is None
    blind = report_mask(Selection(random.mask(), random.blocksize, random.row_order, random), score).score
    assert blind.efficacy < report.efficacy


def test_scores_add_up_over_layers():
    total = total_score([Score(10, 4, 8, 3), None, Score(20, 6, 9, 2)])
    assert total == Score(30, 10, 17, 5)
    assert total_score([Score(10, 4, 8, 3), Score(20, 6, 9, None)]).random is None
    assert total_score([None]) is None


# ---------------------------------------------------------------- storage


# AlexNet's convolutions (K, C / groups, R, S): Mao et al. publish density -> storage of the whole network.
ALEXNET = [(96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3)]


@pytest.mark.parametrize(
    ("structure", "density", "storage"), [("unstructured", 22.1, 33.0), ("vector", 29.9, 34.5), ("kernel", 37.8, 39.7)]
)
def test_storage_model_gives_the_published_pairs(structure, density, storage):
    reports, streams = [], []
    for shape in ALEXNET:
        made = choose(scores(0, shape), 1 - density / 100, structure)
        reports.append(report_mask(made))
        streams.append(stream(made, reports[-1].grain))
    cells = sum(map(math.prod, ALEXNET))
    assert 100 * sum(r.kept for r in reports) / cells == pytest.approx(density, abs=0.01)
    assert sum(r.storage.model_dense for r in reports) == cells
    assert sum(r.storage.model for r in reports) == sum(s.bits() for s in streams) / 8
    # Without fillers: where those networks keep more, gaps are shorter than in masks that are evenly random.
    size = sum(int((~s.fillers).sum()) * (s.weights + 1 / 2) for s in streams)
    # 0-D of exactly 22.1% has 33.15%: the pairs are rounded to a tenth, which is 1.5 times that in storage.
    assert 100 * size / cells == pytest.approx(storage, abs=0.2)


@given(patterns(), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_bytes_are_those_that_a_module_holds_and_saves(pattern, dtype):
    conv = BSRConv2d(pattern, bias=False, dtype=dtype)
    storage = report_mask(stored_blocks(pattern), dtype=dtype).storage
    assert storage.values == conv.values.untyped_storage().nbytes()
    assert storage.memory_index == conv.index.untyped_storage().nbytes()
    state = conv.state_dict()
    tables = sum(t.numel() * t.itemsize for key, t in state.items() if key != "values")
    bits = math.ceil(math.prod(pattern.shape) / 8)  # what `save` writes of single weights, if it is less
    single = pattern.blocksize == (1, 1) and pattern.row_order is None
    assert storage.file_index == (min(tables, bits) if single else tables)
    assert storage.dense == conv.to_dense().weight.numel() * dtype.itemsize


def test_bytes_are_those_of_a_file():
    """Within the header: a file of twice the layer differs by the layer, up to the format's padding to 64 bytes."""
    made = choose(scores(0, (128, 64, 3, 3)), 0.8, "hrbp++")

    def size(copies):
        buffer = io.BytesIO()
        convs = [BSRConv2d(made.pattern(), bias=False) for _ in range(copies)]
        torch.save(nn.ModuleList(convs).state_dict(), buffer)
        return len(buffer.getvalue())

    storage = report_mask(made).storage
    assert 0 <= (size(9) - size(1)) / 8 - (storage.values + storage.file_index) < 3000


class Small(nn.Module):
    """A network with all that a file may hold: a stem, strided and 1x1 convolutions, batch norm, a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2), nn.Conv2d(32, 64, 1, bias=False), nn.Conv2d(64, 32, 3))
        self.last = nn.Linear(32, 5)


@pytest.mark.parametrize("name", [None, *(line[0] for line in STRUCTURES)])
def test_bytes_are_those_that_a_saved_model_has_on_disk(name, tmp_path):
    """torch.save makes a ZIP archive: its members data/0, data/1, ... are the tensors, the rest is the header."""
    torch.manual_seed(0)
    model = Small()
    if name is not None:
        _, options, sparsity, _ = next(line for line in STRUCTURES if line[0] == name)
        sparsify(model, sparsity, structure=name, distribution="uniform", saliency="magnitude", **options)
    reports = report_model(model)
    save(model, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename]
    layers = sum(report.storage.values + report.storage.file_index for report in reports.values())
    rest = [t for key, t in model.state_dict().items() if key.endswith("bias") or key.startswith("norm")]
    assert sum(m.file_size for m in members) == layers + sum(t.numel() * t.itemsize for t in rest)
    header = (tmp_path / "model.pt").stat().st_size - sum(m.file_size for m in members)
    assert 0 < header < 500 * len(members) + 3000
    again = load(tmp_path / "model.pt", Small())
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    if name in ("unstructured", "vector", "kernel", "n:m"):
        report, layer = reports["body.0"], model.body[0]
        held = layer.values.numel() * 4 + layer.index.numel() * 4
        assert report.storage.values + report.storage.memory_index == held
        assert report.storage.file_index == 32 * 16 * 9 / 8
        found = read_weights(tmp_path / "model.pt")  # as `info` reads it
        assert torch.equal(found["body.0.mask"], layer.pattern.to_mask())
        assert torch.equal(found["body.0.weight"], layer.pattern.to_dense(layer.values.detach()))


def test_very_sparse_layers_are_written_as_indices(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    sparsify(model, 0.99, structure="unstructured", include=["1", "2"], distribution="uniform")
    save(model, tmp_path / "model.pt")
    assert "1.indices" in torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    again = load(tmp_path / "model.pt", nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_dense_layers_store_no_index():
    report = report_mask(torch.ones(8, 4, 3, 3, dtype=torch.bool), dtype=torch.float16)
    storage = report.storage
    assert (storage.dense, storage.values, storage.memory_index, storage.file_index) == (576, 576, 0, 0)
    assert storage.model == storage.model_dense == 288
    full = stored_blocks(BSRPattern.full((8, 4, 3, 3), (4, 4)))
    assert report_mask(full).storage.file_index == 4 * (3 + 18 + 4)  # indptr, indices, weight_shape


def test_blocks_with_holes_store_more_than_they_keep():
    mask = torch.zeros(8, 8, 1, 1, dtype=torch.bool)
    mask[0, 0] = mask[5, 6] = True
    report = report_mask(Selection(mask, (4, 4)))
    assert (report.kept, report.stored) == (2, 32)


# ---------------------------------------------------------------- balance


@given(small_masks)
def test_balance_is_largest_over_mean(mask):
    report = report_mask(mask)
    for found, axis in ((report.row_balance, 0), (report.column_balance, 1)):
        assert found == pytest.approx(largest_over_mean([int(part.sum()) for part in mask.unbind(axis)]))


def largest_over_mean(counts):
    return max(counts) * len(counts) / sum(counts) if sum(counts) else 1.0


@given(st.integers(1, 30), st.integers(1, 20), st.booleans(), st.integers(0, 999))
def test_balance_of_eight_filters_and_eight_channels(k, c, moved, seed):
    """Cell by cell: filters in the order of their rows, channels in their own."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(k, c, 2, 1, generator=generator) < 0.3
    order = torch.randperm(k, generator=generator) if moved else torch.arange(k)
    fprop, dgrad = [0] * -(-k // 8), [0] * -(-c // 8)
    for row, filter in enumerate(order.tolist()):
        for channel in range(c):
            for tap in range(2):
                if mask[filter, channel, tap, 0]:
                    fprop[row // 8] += 1
                    dgrad[channel // 8] += 1
    report = report_mask(Selection(mask, (1, 1), order))
    assert report.fprop_balance == pytest.approx(largest_over_mean(fprop))
    assert report.dgrad_balance == pytest.approx(largest_over_mean(dgrad))


# ---------------------------------------------------------------- models and tables


def test_report_of_a_model():
    torch.manual_seed(0)
    made = choose(scores(0), 0.75, "hrbp++", groups=4)
    model = nn.ModuleDict({
        "sparse": BSRConv2d(made.pattern(), dtype=torch.float64),
        "linear": BSRLinear(BSRPattern.random((16, 8, 1, 1), (4, 2), 0.5)),
        "plain": nn.Conv2d(4, 8, 3),
        "pruned": nn.Linear(8, 8, dtype=torch.float16),
        "norm": nn.BatchNorm2d(8),
    })  # fmt: skip
    with torch.no_grad():
        model["pruned"].weight[:, 3] = 0
        model["sparse"].values[0] = 0  # a stored zero is stored
    reports = report_model(model, {"sparse": scores(1)})
    assert list(reports) == ["sparse", "linear", "plain", "pruned"]
    assert [r.structure for r in reports.values()][2] == "dense"
    assert reports["sparse"].kept == int(made.mask.sum())
    assert reports["sparse"].structure == "4 groups of 8: 9 of 16 channels, 4 of 9 taps"
    assert reports["sparse"].storage.values == 8 * int(made.mask.sum())
    assert reports["sparse"].score.efficacy is not None
    assert reports["linear"].kept == 64
    assert reports["pruned"].kept == 56
    assert reports["pruned"].storage.values == 112
    assert report_model(dict.fromkeys("ab", made))["b"] == report_mask(made)
    assert report_model({"w": model["pruned"].weight})["w"] == reports["pruned"]
    with pytest.raises(ValueError, match=r"report_model\(\): scores has other; the layers are w"):
        report_model({"w": made}, {"other": scores(0)})


def test_table_has_a_line_a_layer_and_their_totals():
    made = choose(scores(0), 0.75, "hrbp++", groups=4)
    reports = report_model({"one": made, "two": torch.ones(32, 16, 3, 3, dtype=torch.bool)}, {"one": scores(0)})
    lines = table(reports).splitlines()
    assert len(lines) == 4
    share = reports["one"].score
    assert f"{100 * share.of_unstructured:.1f}" in lines[1].split()
    assert lines[3].split()[:2] == ["all", "62.50"]
    values = reports["one"].storage.values + reports["one"].storage.file_index + 4 * 4608
    assert lines[3].split()[-1] == f"{values / 1e3:.1f}"
    assert len(table({"one": reports["one"]}).splitlines()) == 2
    assert "retained" not in table({"two": reports["two"]})


def test_wrong_input_is_refused():
    mask = torch.ones(4, 4, 1, 1, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask has dtype torch.float32; it needs torch.bool"):
        report_mask(mask.float())
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); it needs \[K, C, R, S\], \[K, C, S\] or \[K, C\]"):
        report_mask(mask[:, 0, 0, 0])
    with pytest.raises(ValueError, match=r"score has shape \(4, 3, 1, 1\); it needs \(4, 4, 1, 1\)"):
        report_mask(mask, torch.ones(4, 3))
    with pytest.raises(ValueError, match="negative, infinite or NaN"):
        report_mask(mask, torch.full((4, 4), math.nan))


def test_unstructured_reference_takes_exactly_as_many():
    """Ties at the last score: the sum is of that many cells, not of all that tie."""
    score = torch.ones(4, 4, 1, 1)
    mask = top(score.view(1, -1), 5).view(4, 4, 1, 1)
    assert report_mask(mask, score).score.unstructured == 5.0


# ---------------------------------------------------------------- n:m in the input gradient


def operand(mask, layout):
    """W' [C, K*R*S]: kernels rotated, K and C exchanged, in the order in which the layout stores what it multiplies."""
    k, c, r, s = mask.shape
    rows = []
    for channel in range(c):
        at = [(i, j) for i in range(r) for j in range(s)]
        order = (
            [(f, *tap) for tap in at for f in range(k)] if layout == "NHWC" else [(f, *t) for f in range(k) for t in at]
        )
        rows.append([bool(mask[f, channel, r - 1 - i, s - 1 - j]) for f, i, j in order])
    return torch.tensor(rows)


def is_ratio(matrix, n, m):
    return matrix.shape[1] % m == 0 and all(
        sum(row[i : i + m]) <= n for row in matrix.tolist() for i in range(0, matrix.shape[1], m)
    )


def both_ways(k, c, r, s, seed):
    """2:4 along filters and along channels: tiles of 4x4 that keep two of each row and column, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.zeros(k // 4, c // 4, r, s, 4, 4, dtype=torch.bool)
    for tile in tiles.view(-1, 4, 4):
        base = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 1)
        tile[:] = base[torch.randperm(4, generator=generator)][:, torch.randperm(4, generator=generator)]
    return tiles.permute(0, 4, 1, 5, 2, 3).reshape(k, c, r, s)


@settings(max_examples=40)
@given(st.sampled_from([4, 8, 6]), st.sampled_from([(1, 1), (3, 3), (2, 4)]), st.booleans(), st.integers(0, 2**32 - 1))
def test_which_masks_are_n_m_both_ways(k, taps, transposable, seed):
    if transposable and k % 4 == 0:
        mask = both_ways(k, 8, *taps, seed)
    else:
        mask = choose(scores(seed, (k, 8, *taps)), 0.5, "2:4").mask
    said = dgrad_ratio(mask, 2, 4)
    assert (said == "2:4") == (k % 4 == 0 and is_ratio(operand(mask, "NHWC"), 2, 4))
    if transposable and k % 4 == 0:
        assert said == "2:4"
    if k % 4:
        assert said == "no, K = 6"
    elif said != "2:4":
        runs = operand(mask, "NHWC").view(-1, 4).sum(1)
        assert said == f"no, {100 * float((runs > 2).double().mean()):.3g}% over"
    if taps == (3, 3):
        assert report_mask(mask).dgrad_ratio == said


def test_channels_last_alone_keeps_n_m():
    mask = both_ways(8, 8, 3, 3, 0)
    assert dgrad_ratio(mask, 2, 4) == "2:4"
    assert not is_ratio(operand(mask, "NCHW"), 2, 4)
    assert is_ratio(operand(both_ways(8, 8, 1, 1, 0), "NCHW"), 2, 4)


def test_the_table_says_what_is_read():
    few = choose(scores(0, (16, 16, 3, 3)), 0.875, "hrbp", balanced=True)
    all_read = torch.ones(4, 4, 1, 1, dtype=torch.bool).tril()
    found = report_model({"few": few, "all": all_read})
    assert [(r.coverage, r.unread) for r in found.values()] == [(0.25, 12), (None, 0)]
    head, first, second = table(found).splitlines()[:3]
    assert head.split()[8:12] == ["kept%", "structure", "cover", "unread%"]
    at = head.index("unread%") + len("unread%")
    assert first[:at].split()[-2:] == ["0.25", "75"]
    assert second[:at].endswith(" " * 14)
    assert "unread" not in table({"all": found["all"]})


def test_the_table_says_which_masks_are_n_m_both_ways():
    masks = {
        "a": both_ways(8, 8, 3, 3, 0), "b": choose(scores(1, (8, 8, 3, 3)), 0.5, "2:4").mask,
        "c": choose(scores(2, (6, 8, 1, 1)), 0.5, "2:4").mask,
    }  # fmt: skip
    lines = table(report_model(masks)).splitlines()
    ends = "dgrad n:m", " 2:4", "% over", "no, K = 6"
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=False))
    assert [len(line) for line in lines[:4]] == [len(lines[0])] * 4
    assert "n:m" not in table(report_model({"d": torch.rand(8, 8, 3, 3) > 0.5}))
    assert report_mask(torch.ones(4, 4, 1, 1, dtype=torch.bool)).dgrad_ratio is None
