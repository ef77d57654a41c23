"""Density and storage at equal accuracy: interpolated where networks bracket the loss, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hrbp.study.equal_accuracy import Point, bracketed, equal_accuracy, parts
from hrbp.study.page import Parts, write_study
from hrbp.study.regularity_table import line_name

SPARSITIES = [0.5, 0.75, 0.875]


def chain(*losses):
    return [Point(loss, 1 - s, 2 * (1 - s), None) for loss, s in zip(losses, SPARSITIES, strict=True)]


@pytest.mark.parametrize(
    ("losses", "density"),
    [
        ((0.0, 0.02, 0.05), 0.5 - 0.25 / 2),
        ((0.0, 0.01, 0.03), 0.25),  # exactly there: still equal
        ((-0.02, 0.0, 0.04), 0.25 - 0.125 / 4),  # better than dense, first
        ((0.01, 0.02, 0.0), 0.5),  # the first time that it is lost counts
        ((0.0, 0.02, 0.005), 0.375),
        ((0.011, 0.0, 0.05), "denser"),  # what comes back later does not count
        ((0.02, 0.03, 0.04), "denser"),
        ((-0.01, 0.0, 0.01), "sparser"),
    ],
)
def test_the_first_two_neighbours_that_bracket_it(losses, density):
    found = bracketed(chain(*losses), 0.01)
    if isinstance(density, str):
        assert found == density
    else:
        assert (found.loss, found.density, found.storage, found.scnn) == pytest.approx(
            (0.01, density, 2 * density, None)
        )
    assert bracketed(chain(*losses)[:1], 0.0) in ("denser", "sparser")  # one network brackets nothing


def results(losses, left_out=()):
    """A study of two seeds. losses: structure -> seed -> loss at each sparsity; dense is 0.8 and 0.9."""
    runs = []
    for seed, dense in enumerate((0.8, 0.9)):
        for i, asked in enumerate(SPARSITIES):
            for name, of in {"dense": [(0, 0, 0)] * 2, **losses}.items():
                line = line_name(f"narrow as {100 * asked:g}%" if name == "narrow" else name, asked)
                if line in left_out or of[seed] is None:
                    continue
                runs.append({
                    "line": line, "structure": name, "asked": asked, "seed": seed, "accuracy": dense - of[seed][i],
                    "sparsity": asked, "stream": 800 * (1 - asked) * (1.5 if name == "unstructured" else 1.0),
                    "scnn": {"values": 100 * (1 - asked), "sums": 0},
                })  # fmt: skip
    return {
        "settings": {"structures": ["dense", *losses], "sparsities": SPARSITIES, "seeds": [0, 1]},
        "trained": {"stream": 800, "scnn": {"values": 200, "sums": 0}}, "runs": runs,
        "left_out": dict.fromkeys(left_out, "a reason"),
    }  # fmt: skip


LOSSES = {
    "narrow": [(0.02, 0.03, 0.04), (0.01, 0.03, 0.05)],
    "unstructured": [(0.0, 0.02, 0.05), (0.0, 0.01, 0.05)],
    "kernel": [(0.0, 0.05, 0.06), (0.0, 0.05, 0.06)],
    "filter": [(0.0, 0.005, 0.009), (0.0, 0.005, 0.02)],
}


def test_a_grain_has_a_value_where_every_seed_is_bracketed():
    narrow, single, kernel, filters = equal_accuracy(results(LOSSES), 0.01)
    assert single["density"].mean == pytest.approx((0.375 + 0.25) / 2)
    half = 12.7062047 * 0.125 / math.sqrt(2) / math.sqrt(2)
    assert single["density"].low == pytest.approx(single["density"].mean - half)
    assert single["storage"].mean == pytest.approx(1.5 * single["density"].mean)
    assert single["scnn"] is None  # it is the measure
    assert kernel["scnn"].mean == pytest.approx((0.45 / 0.375 + 0.45 / 0.25) / 2)
    assert kernel["density"].mean == pytest.approx(0.45)
    assert kernel["against"].mean == pytest.approx(0.45 - 1.5 * 0.3125)
    assert (kernel["against"].low, single["against"]) != (None, None)
    for row, denser, sparser in ((narrow, 1, 0), (filters, 0, 1)):
        assert (row["density"], row["storage"], row["scnn"], row["against"]) == (None, None, None, None)
        assert (row["seeds"], row["denser"], row["sparser"]) == (2, denser, sparser)


def test_narrow_networks_are_dense_ones_of_their_share_of_weights():
    found = {**LOSSES, "narrow": [(0.0, 0.02, 0.04)] * 2}
    narrow = equal_accuracy(results(found), 0.01)[0]
    assert narrow["density"] == narrow["storage"]
    assert narrow["density"].mean == pytest.approx(0.375)


def test_chains_that_are_not_whole_do_not_count():
    """One that is not trained yet, or diverged; a sparsity that a structure does not have is no gap."""
    made = results({"unstructured": [(0.0, 0.02, 0.05), None], "vector": [(0.0, 0.02, 0.05)] * 2})
    next(r for r in made["runs"] if r["structure"] == "vector" and r["seed"] == 1)["accuracy"] = None
    single, vector = equal_accuracy(made, 0.01)
    assert (single["seeds"], vector["seeds"]) == (1, 1)
    assert (single["density"].mean, single["density"].low) == (pytest.approx(0.375), None)
    missing = line_name("kernel", 0.75)
    (kernel,) = equal_accuracy(results({"kernel": [(0.0, 0.0, 0.02)] * 2}, left_out=(missing,)), 0.01)
    assert kernel["density"].mean == pytest.approx(0.5 - 0.375 / 2)
    for run in made["runs"]:
        run.pop("scnn")  # of a folder that was made before these were counted
    assert equal_accuracy(made, 0.01)[1]["scnn"] is None


def test_the_table_says_what_was_not_reached(tmp_path):
    shown = parts(results(LOSSES), 0.01)
    cells = {line[0]: line[1:] for line in shown.lines}
    assert cells["narrow"] == ["-", "-", "-", "-", "not reached: 1 denser of 2"]
    assert cells["3-D filter"][-1] == "not reached: 1 sparser of 2"
    assert cells["2-D kernel"][:2] == ["45.0 [45.0, 45.0]", "45.0 [45.0, 45.0]"]
    assert cells["2-D kernel"][3].startswith("1.50 [")
    assert cells["0-D weight"][-1] == "2"
    assert shown.title.endswith("minus 1 point")
    first = Parts("first", ["a"], [["b"]], ["c"], ["d"])
    both = replace(first, further=[shown])
    assert both.text().startswith(first.text() + "\n\n" + shown.title)
    page = write_study(tmp_path, both, [{"settings": {}, "machine": "a machine"}], "none.png", ["hrbp"]).read_text()
    assert "not reached: 1 denser of 2" in page
    assert parts({**results(LOSSES), "runs": []}, 0.01) is None
    with pytest.raises(ValueError, match=r"tolerance is -0\.1; it needs a share in \[0, 1\)"):
        equal_accuracy(results(LOSSES), -0.1)
