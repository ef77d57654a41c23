"""Streams of records: really written to bits, read back, and run by a machine that counts what it touches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrbp.reports.mask_report import report_mask
from hrbp.structures.base import Selection
from hrbp.structures.registry import choose
from test_report import SHAPE, STRUCTURES, scores, small_masks


def width(count):
    """Bits of a number below `count`."""
    bits = 0
    while 2**bits < count:
        bits += 1
    return bits


class Bits:
    """A file: numbers of so many bits, one after the other."""

    def __init__(self):
        self.text, self.at = "", 0

    def write(self, number, bits):
        assert 0 <= number < 2**bits
        self.text += f"{number:0{bits}b}" if bits else ""

    def read(self, bits):
        self.at += bits
        assert self.at <= len(self.text)
        return int(self.text[self.at - bits : self.at] or "0", 2)


def kind_of(choice):
    """What stands in the header: which grains there are, and of what filters, channels and taps each is."""
    mask, k = choice.mask, len(choice.mask)
    report = report_mask(choice)
    order = list(range(k)) if choice.row_order is None else choice.row_order.tolist()
    moved = order != list(range(k))
    if choice.grouping is not None:
        groups, taps = choice.grouping.groups, [sorted(t) for t in choice.grouping.taps.tolist()]
        return {"kind": "groups", "moved": moved, "order": order, "parts": groups, "taps": taps, "p": len(taps[0])}
    if report.grain == (1, 1, 1, 1) and not moved:
        for m in (2, 4, 8, 16, 32):
            counts = {int(run.sum(0)[i, j]) for o in mask for run in o.split(m) for i in range(mask.shape[2])
                      for j in range(mask.shape[3])}  # fmt: skip
            if mask.shape[1] % m == 0 and len(counts) == 1:
                return {"kind": "n:m", "n": counts.pop(), "m": m}
    if mask.all() and choice.blocksize is None:
        return {"kind": "dense"}
    return {"kind": "boxes", "moved": moved, "order": order, "parts": k // report.grain[0], "box": report.grain}


def grains_of(kind, shape, members):
    """Every grain in the order of the stream: (filters, channels, taps), filters of a block-row in ascending order."""
    k, c, r, s = shape
    if kind["kind"] == "groups":
        return [(members[g], [i], kind["taps"][g]) for g in range(kind["parts"]) for i in range(c)]
    bk, bc, br, bs = kind["box"]
    return [
        (members[row], range(col * bc, (col + 1) * bc), [y * s + x for y in range(i * br, (i + 1) * br)
                                                          for x in range(j * bs, (j + 1) * bs)])
        for row in range(k // bk) for col in range(c // bc) for i in range(r // br) for j in range(s // bs)
    ]  # fmt: skip


def written(choice, weight, index_bits=4):
    """Bits of the kept weights (8-bit numbers [K, C, R, S])."""
    kind, file = kind_of(choice), Bits()
    k, c, r, s = choice.mask.shape
    flat, kept = weight.reshape(k, c, r * s).tolist(), choice.mask.reshape(k, c, r * s).tolist()
    if kind["kind"] == "dense":
        for number in weight.flatten().tolist():
            file.write(number, 8)
        return kind, file
    if kind["kind"] == "n:m":
        for o in range(k):
            for start in range(0, c, kind["m"]):
                for tap in range(r * s):
                    for i in range(kind["m"]):
                        if kept[o][start + i][tap]:
                            file.write(i, width(kind["m"]))
                            file.write(flat[o][start + i][tap], 8)
        return kind, file
    size = k // kind["parts"]
    place = {filter: row // size for row, filter in enumerate(kind["order"])}
    if kind["moved"]:
        for o in range(k):
            file.write(place[o], width(kind["parts"]))
    if kind["kind"] == "groups" and kind["p"] < r * s:
        for taps in kind["taps"]:
            for tap in range(r * s):
                file.write(int(tap in taps), 1)
    members = [[o for o in range(k) if place[o] == part] for part in range(kind["parts"])]
    passed = 0
    for filters, channels, taps in grains_of(kind, (k, c, r, s), members):
        if not any(kept[o][i][t] for o in filters for i in channels for t in taps):
            passed += 1
            continue
        cells = [flat[o][i][t] for o in filters for i in channels for t in taps]
        while passed >= 2**index_bits:
            file.write(2**index_bits - 1, index_bits)
            for _ in cells:
                file.write(0, 8)
            passed -= 2**index_bits
        file.write(passed, index_bits)
        for number in cells:
            file.write(number, 8)
        passed = 0
    return kind, file


class Machine:
    """Reads such bits for one output pixel and counts every reference to memory."""

    def __init__(self, x, shape):
        self.x, self.shape = x, shape  # inputs [C][R*S]
        self.y = [0] * shape[0]
        self.values = self.indices = self.inputs = self.sums = 0

    def weight(self, file):
        self.values += 1
        return file.read(8)

    def index(self, file, bits):
        self.indices += 1
        return file.read(bits)

    def input(self, channel, tap):
        self.inputs += 1
        return self.x[channel][tap]

    def add(self, filter, partial):
        self.sums += 1
        self.y[filter] += partial

    def run(self, kind, file, index_bits=4):
        k, c, r, s = self.shape
        if kind["kind"] == "dense":
            inputs = [self.input(i, t) for i in range(c) for t in range(r * s)]
            for o in range(k):
                self.add(o, sum(self.weight(file) * v for v in inputs))
        elif kind["kind"] == "n:m":
            for o in range(k):
                for start in range(0, c, kind["m"]):
                    for tap in range(r * s):
                        for _ in range(kind["n"]):
                            channel = start + self.index(file, width(kind["m"]))
                            self.add(o, self.weight(file) * self.input(channel, tap))
        else:
            self.run_records(kind, file, index_bits)
        assert file.at == len(file.text)

    def run_records(self, kind, file, index_bits):
        k, _, r, s = self.shape
        size = k // kind["parts"]
        place = [o // size for o in range(k)]
        if kind["moved"] and kind["parts"] > 1:
            place = [self.index(file, width(kind["parts"])) for _ in range(k)]
        members = [[o for o in range(k) if place[o] == part] for part in range(kind["parts"])]
        if kind["kind"] == "groups":
            kind = {**kind, "taps": [list(range(r * s))] * kind["parts"]}
            if kind["p"] < r * s:
                kind["taps"] = [[t for t in range(r * s) if file.read(1)] for _ in range(kind["parts"])]
                self.indices += kind["p"] * kind["parts"]  # the taps that there are
        grains = grains_of(kind, self.shape, members)
        registers = dict.fromkeys(range(k), 0)
        at = -1
        while file.at < len(file.text):
            at += 1 + self.index(file, index_bits)
            filters, channels, taps = grains[at]
            inputs = [self.input(i, t) for i in channels for t in taps]
            for o in filters:
                partial = sum(self.weight(file) * v for v in inputs)
                if kind["kind"] == "groups":
                    registers[o] += partial
                else:
                    self.add(o, partial)
        if kind["kind"] == "groups":
            for o, partial in registers.items():
                self.add(o, partial)


def check(choice, seed, index_bits=4):
    generator = torch.Generator().manual_seed(seed)
    k, c, r, s = choice.mask.shape
    weight = torch.randint(1, 256, choice.mask.shape, generator=generator)
    x = torch.randint(1, 100, (c, r * s), generator=generator)
    report = report_mask(choice, index_bits=index_bits)
    kind, file = written(choice, weight, index_bits)
    assert len(file.text) == 8 * report.storage.model
    machine = Machine(x.tolist(), (k, c, r, s))
    machine.run(kind, file, index_bits)
    assert machine.y == ((weight * choice.mask).view(k, c, r * s) * x).sum((1, 2)).tolist()
    assert (machine.values, machine.indices, machine.inputs, machine.sums) == report.references


@given(small_masks, st.booleans(), st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_any_mask_is_written_and_run(mask, moved, seed, index_bits):
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    check(Selection(mask, (1, 1), order if moved else None), seed, index_bits)


@pytest.mark.parametrize(("name", "options", "sparsity", "_"), STRUCTURES, ids=lambda v: str(v))
def test_every_structure_is_written_and_run(name, options, sparsity, _):
    for seed, index_bits in ((0, 4), (1, 2)):
        check(choose(scores(seed), sparsity, name, **options), seed, index_bits)


def test_fillers_stand_where_an_index_cannot_reach():
    """16 grains are passed over at most with a filler as the last of them; behind the last record there is none."""
    for gap, fillers in ((0, 0), (15, 0), (16, 1), (31, 1), (32, 2)):
        mask = torch.zeros(1, 97, 1, 1, dtype=torch.bool)
        mask[0, [0, gap + 1, gap + 2]] = True
        records = 3 + fillers
        report = report_mask(mask)
        assert report.storage.model == records * 12 / 8
        assert report.references == (records, records, records, records)


def test_ratios_have_places_and_no_fillers():
    made = choose(scores(0), 0.75, "n:m", m=4)
    assert report_mask(made).storage.model == made.mask.sum() * (8 + 2) / 8
    assert report_mask(choose(scores(0), 0.875, "n:m", m=8)).storage.model == made.mask.sum() / 2 * (8 + 3) / 8


def test_coarse_grains_share_references():
    """Mao et al.: about half as many for kernels as for single weights."""
    single, kernel = (report_mask(choose(scores(0), 0.75, name)) for name in ("unstructured", "kernel"))
    assert single.kept == kernel.kept
    assert sum(single.references) == pytest.approx(4 * single.kept, rel=0.02)  # and fillers
    assert sum(kernel.references) == pytest.approx(20 / 9 * kernel.kept, rel=0.02)
    filters = report_mask(choose(scores(0), 0.75, "filter"))
    assert filters.references == (8 * 144, 8, 8 * 144, 8)
    groups = report_mask(choose(scores(0), 0.75, "hrbp", groups=4, row_granule=8))
    assert groups.references == (1152, 4 * 4, 4 * 4 * 9, 32)
    assert SHAPE == (32, 16, 3, 3)
