"""The figures of studies: names that do not overlap, a look of its own for each structure."""

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrbp.columns import counted
from hrbp.progress import Progress
from hrbp.reports.study_picture import _look, spread_out
from hrbp.study.regularity_table import GRAINS, _costs
from hrbp.study.timing import Timing, interleaved
from hrbp.study.variants import BASELINES


@given(st.lists(st.floats(0, 1), max_size=20).map(sorted), st.floats(0.001, 0.05))
def test_names_are_apart_and_in_order(places, gap):
    found = spread_out(places, gap)
    assert len(found) == len(places)
    room = min(gap, 1 / max(1, len(places)))
    assert all(b - a >= room * (1 - 1e-9) for a, b in itertools.pairwise(found))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)
    if all(b - a >= gap for a, b in itertools.pairwise(places)):
        assert found == places


def test_every_structure_has_a_look_of_its_own():
    names = [*BASELINES, *GRAINS]
    looks = [_look(i, name) for i, name in enumerate(names)]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(names), part
    more = [_look(i, str(i)) for i in range(36)]
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in more}) == 36


@pytest.mark.parametrize(
    ("loss", "words"), [(0.03, "(3.0 points less than dense)"), (-0.03, "(3.0 points more"), (0.0001, "(as dense)")]
)
def test_points_are_less_or_more(loss, words):
    assert words in _costs({"loss": loss, "accuracy": 0.5, "time": 0.4, "file_ratio": 0.3})


def test_one_epoch_is_no_epochs():
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]


def test_measuring_says_how_far_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("hrbp.progress.TERMINAL_SECONDS", 0.0)
    out = Terminal()
    steps = {"dense": lambda: 2.0, "sparse": lambda: 1.0}
    found = interleaved(steps, 3, progress=Progress(False, out), what="steps")
    assert found == {"dense": Timing(2.0, 2.0, 2.0), "sparse": Timing(1.0, 1.0, 1.0)}
    lines = [line.strip() for line in out.getvalue().split("\r") if line.strip()]
    assert lines[1].startswith("steps: round 1/5, sparse takes 0.50 of the time of dense, 0 s left")
    assert out.getvalue().endswith("\r")
