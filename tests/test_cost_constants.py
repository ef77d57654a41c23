"""Constants of the CPU's cost model: shipped ones for every dtype, and a user's own, which go before them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from bench import calibrate
from blocksparse import ConvGeometry
from blocksparse.geometry import KINDS
from blocksparse.kernels import cost, cost_constants, machine

G = ConvGeometry.of((8, 64, 56, 56), (64, 64, 3, 3), 1, 1)
SETTING = cost.Setting(1, "contiguous")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No constants but the shipped ones, and none from here left behind."""
    monkeypatch.setattr(machine, "cache", lambda: tmp_path)
    caches = cost_constants.constants, cost.on_cpu
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def predicted(dtype=torch.float32):
    """By a process that has not estimated anything yet."""
    cost_constants.constants.cache_clear()
    cost.on_cpu.cache_clear()
    return cost.on_cpu("fprop", G, (8, 8), 50, dtype, SETTING)


def test_every_dtype_format_and_product_has_constants():
    names = [str(dtype).removeprefix("torch.") for dtype in cost.DTYPES]
    assert cost_constants.constants().keys() >= set(itertools.product(names, (False, True), KINDS))


def test_a_processor_of_another_maker_takes_the_first(monkeypatch):
    known = {}
    for vendor in ("AuthenticAMD", "GenuineIntel", "nobody", None):
        monkeypatch.setattr(machine, "vendor", lambda vendor=vendor: vendor)
        cost_constants.constants.cache_clear()
        known[vendor] = cost_constants.constants()
    assert known["nobody"] == known[None] == known["AuthenticAMD"]
    assert known["GenuineIntel"] != known["AuthenticAMD"]


def test_constants_that_were_kept_decide_on_their_processor_alone(monkeypatch):
    shipped, other = predicted(), predicted(torch.float64)
    stored, dense = cost.constants("fprop", torch.float32, False)
    slow = cost.Terms(*(100 * value for value in stored))
    path = cost_constants.keep({("float32", False, "fprop"): (slow, dense)})
    assert predicted() == pytest.approx((100 * shipped[0], shipped[1]))
    assert predicted(torch.float64) == other
    cost_constants.keep({("float64", False, "fprop"): (slow, dense)})  # beside the others
    assert predicted()[0] == pytest.approx(100 * shipped[0])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(machine, "processor", lambda: "another one")
    assert cost_constants.own_file() != path
    assert predicted() == shipped


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"dtype": "float32"}]}', '{"rows": [1]}'])
def test_a_damaged_file_is_told_and_left_out(content):
    shipped = predicted()
    cost_constants.own_file().write_text(content)
    with pytest.warns(RuntimeWarning, match="constants-.*is damaged"):
        assert predicted() == shipped


def test_calibrate_keeps_what_it_fitted(capsys):
    assert calibrate.main(["--layers", "4", "--rounds", "1", "--keep", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert f"kept for this processor: {cost_constants.own_file()}" in said
    assert {row["dtype"] for row in json.loads(cost_constants.own_file().read_text())["rows"]} == {"float32"}
