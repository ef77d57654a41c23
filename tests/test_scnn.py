"""Memory references of a machine like SCNN, against one that really runs: it fetches, multiplies, adds up, scatters."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hrbp
from hrbp.reports.mask_report import records
from hrbp.reports.network_costs import costs_of
from hrbp.reports.scnn import Window, scnn_of_model, scnn_references
from hrbp.structures.registry import choose
from test_stream import grains_of, kind_of

WINDOWS = {
    "plain": {"padding": 1},
    "no padding": {},
    "strides": {"stride": (2, 3), "padding": (1, 0)},
    "dilation": {"dilation": (1, 2), "padding": (0, 2)},
}


class Machine:
    """Runs one image and counts every reference to memory."""

    def __init__(self, x, k, options, vector):
        self.x, self.vector = x, vector
        _, self.h, self.w = x.shape
        self.stride, self.padding, self.dilation = (
            (value, value) if isinstance(value, int) else value
            for value in (options.get(name, other) for name, other in (("stride", 1), ("padding", 0), ("dilation", 1)))
        )
        self.k = k
        self.values = self.indices = self.inputs = self.sums = 0

    def run(self, weight, passes, lists, out, own):
        """passes: what is done before accumulators are touched: lists of records (filters, channels, taps, filler).

        own: every record fetches its inputs.
        """
        y = torch.zeros(self.k, *out, dtype=torch.float64)
        s = weight.shape[3]
        for row in range(self.h):
            for at in range(0, self.w, self.vector):
                columns = range(at, min(at + self.vector, self.w))
                held = set()  # channels whose vector lies in registers, of records of one channel
                self.indices += lists
                for one_pass in passes:
                    partial = {}
                    for filters, channels, taps, filler in one_pass:
                        self.indices += 1
                        for c in channels:
                            if own or (c not in held and not filler):
                                self.inputs += len(columns)
                                held.add(c)
                            self.values += len(filters) * len(taps)
                            if filler:
                                continue
                            for f, tap, x in itertools.product(filters, taps, columns):
                                i, j = divmod(tap, s)
                                oy, ry = divmod(row + self.padding[0] - i * self.dilation[0], self.stride[0])
                                ox, rx = divmod(x + self.padding[1] - j * self.dilation[1], self.stride[1])
                                if ry == rx == 0 and 0 <= oy < out[0] and 0 <= ox < out[1]:
                                    product = weight[f, c, i, j] * self.x[c, row, x]
                                    partial[f, oy, ox] = partial.get((f, oy, ox), 0.0) + product
                    self.sums += len(partial)
                    for (f, oy, ox), value in partial.items():
                        y[f, oy, ox] += value
        return y


def passes_of(choice):
    """Records as the stream has them, with fillers where 16 grains or more were skipped; and entries of lists."""
    mask = choice.mask
    k, c, r, s = mask.shape
    kind = kind_of(choice)
    if kind["kind"] == "n:m":
        cells = mask.reshape(k, c, r * s).nonzero().tolist()
        return [[([f], [i], [tap], False)] for f, i, tap in cells], 0
    size = k // kind["parts"]
    members = [kind["order"][part * size : (part + 1) * size] for part in range(kind["parts"])]
    flat = mask.reshape(k, c, r * s)
    found, passed = [], 0
    for filters, channels, taps in grains_of(kind, mask.shape, members):
        if not flat[filters[0], channels[0], taps[0]]:
            passed += 1
            continue
        found += [(filters, list(channels), taps, True)] * (passed // 16) + [(filters, list(channels), taps, False)]
        passed = 0
    lists = k if kind["moved"] else 0
    if kind["kind"] == "groups":
        lists += kind["parts"] * kind["p"] if kind["p"] < r * s else 0
        of = {id(filters): [record for record in found if record[0] is filters] for filters in members}
        return list(of.values()), lists
    return [[record] for record in found], lists


KINDS = {
    "unstructured": {}, "vector": {}, "kernel": {}, "filter": {}, "channel": {}, "1xn": {"n": 2}, "n:m": {"m": 4},
    "block": {"blocksize": (2, 4)}, "hrbp": {"groups": 2, "min_rows": 2}, "hrbp++": {"groups": 2, "min_rows": 2},
    "elementwise": {"groups": 2, "min_rows": 2},
}  # fmt: skip
CASES = [*zip(KINDS, itertools.cycle(WINDOWS)), *itertools.product(("vector", "hrbp++"), WINDOWS)]


@pytest.mark.parametrize(("structure", "window"), sorted(set(CASES)))
def test_against_a_machine_that_runs(structure, window):
    k, c, r, s, vector = 4, 8, 3, 2, 4
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(k, c, r, s, generator=generator, dtype=torch.float64) + 0.1
    choice = choose(weight, 0.75, structure=structure, **KINDS[structure])
    weight = weight * choice.mask
    x = torch.rand(c, 5, 7, generator=generator, dtype=torch.float64)
    expected = F.conv2d(x[None], weight, **WINDOWS[window])[0]
    out = tuple(expected.shape[1:])
    machine = Machine(x, k, WINDOWS[window], vector)
    passes, lists = passes_of(choice)
    y = machine.run(weight, passes, lists, out, own=structure in ("filter", "block", "hrbp", "hrbp++"))
    torch.testing.assert_close(y, expected)
    told = scnn_references(choice, Window((5, 7), out, machine.stride, machine.padding, machine.dilation), vector)
    assert told == (machine.values, machine.indices, machine.inputs, machine.sums)
    assert len(records(choice)[2].gaps) == sum(map(len, passes))


def test_fillers_are_read_and_write_nothing():
    mask = torch.zeros(1, 40, 1, 1, dtype=torch.bool)
    mask[0, [0, 39]] = True
    told = scnn_references(mask, Window((1, 4), (1, 4)))
    assert told == (4, 4, 8, 8)  # two weights and two fillers; two channels of four; every product its own output


def test_the_formula_by_hand():
    """A kernel of 3x3 on a vector of 4: 3 rows of 4 + 2 outputs, where 9 single weights write 36."""
    whole, vector = Window((3, 4), (5, 6), padding=(2, 2)), [(i, j) for i in range(3) for j in range(3)]
    assert whole.outputs(vector) == 3 * 3 * 6
    assert sum(whole.outputs([tap]) for tap in vector) == 3 * 9 * 4
    assert Window((3, 5), (5, 7), padding=(2, 2)).outputs(vector) == 3 * 3 * (6 + 3)  # a vector of 4 and one of 1


def test_coarse_grains_refer_less():
    """At one density, on a layer as large as real ones: what the paper's abstract says, on this machine."""
    score = torch.rand(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    window = Window((8, 8), (8, 8), padding=(1, 1))
    grains = "unstructured", "vector", "kernel", "filter"
    totals = [sum(scnn_references(choose(score, 0.7, structure=name), window)) for name in grains]
    assert totals == sorted(totals, reverse=True)


def test_a_model_is_counted_layer_by_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, stride=2, padding="valid")
            self.split = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.line = nn.Conv1d(8, 4, 3, padding=1)
            self.last = nn.Linear(4, 5)

        def forward(self, x):
            return self.last(self.line(self.split(self.first(x)).flatten(2)).transpose(1, 2))

    torch.manual_seed(0)
    model = Net()
    hrbp.sparsify(model, 0.5, structure="kernel", include=["split"], saliency="magnitude")
    told = scnn_of_model(model, (3, 9, 9))
    split = model.split.pattern.to_mask()
    assert told["first"] == scnn_references(torch.ones(8, 3, 3, 3).bool(), Window((9, 9), (4, 4), (2, 2)))
    assert told["first"][1] == 0  # dense: no index
    records_, vectors = int(split.any(3).any(2).sum()), 4
    assert told["split"][:2] == (records_ * 9 * vectors, records_ * vectors)
    read = split.view(2, 4, 4, 9).any(3).any(1).sum()
    assert told["split"].inputs == read * 16
    assert told["line"] == scnn_references(torch.ones(4, 8, 3).bool(), Window((1, 16), (1, 16), padding=(0, 1)))
    assert told["last"] == (16 * 20, 0, 16 * 4, 16 * 5)
    costs = costs_of(model, (3, 9, 9))
    assert costs["scnn"] == {kind: sum(getattr(t, kind) for t in told.values()) for kind in told["last"]._fields}
