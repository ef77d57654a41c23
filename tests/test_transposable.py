"""Transposable n:m masks: n:m along channels and along filters, and the best there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import hrbp
from hrbp.layers.view import sparse_layers
from hrbp.reports.mask_report import report_mask
from hrbp.structures.registry import choose, structure
from hrbp.structures.transposable import best_tiles

SEEDS = st.integers(0, 2**32 - 1)


def tile_scores(tiles: int, m: int, seed: int, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(tiles, m, m, generator=generator, dtype=torch.float64)
    return (3 * score).floor() if ties else score


@settings(max_examples=40)
@given(st.integers(2, 4), st.data(), st.booleans(), SEEDS)
def test_small_tiles_are_the_best_by_brute_force(m, data, ties, seed):
    n, score = data.draw(st.integers(1, m)), tile_scores(3, m, seed, ties)
    rows = list(itertools.combinations(range(m), n))
    for tile, kept in zip(score, best_tiles(score, n), strict=True):
        assert (kept.sum(0) == n).all()
        assert (kept.sum(1) == n).all()
        best = max(
            sum(float(tile[i, j]) for i, row in enumerate(choice) for j in row)
            for choice in itertools.product(rows, repeat=m)
            if all(sum(j in row for row in choice) == n for j in range(m))
        )
        assert float(tile[kept].sum()) == pytest.approx(best, rel=1e-12)


@settings(max_examples=15)
@given(st.sampled_from([(2, 8), (4, 8), (3, 6), (4, 16)]), st.booleans(), SEEDS)
def test_larger_tiles_are_the_best_by_linear_programming(ratio, ties, seed):
    n, m = ratio
    score = tile_scores(2, m, seed, ties)
    sums = torch.cat([torch.eye(m).repeat_interleave(m, 1), torch.eye(m).repeat(1, m)]).numpy()
    for tile, kept in zip(score, best_tiles(score, n), strict=True):
        assert (kept.sum(0) == n).all()
        assert (kept.sum(1) == n).all()
        best = milp(-tile.flatten().numpy(), constraints=LinearConstraint(sums, n, n), bounds=Bounds(0, 1))
        assert float(tile[kept].sum()) == pytest.approx(-best.fun, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (16, 8, 1, 5)])
def test_it_is_n_m_in_both_products(shape):
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    made = choose(score, 0.5, "transposable")
    k, c = shape[:2]
    assert (made.mask.view(k, c // 4, 4, -1).sum(2) == 2).all()
    assert (made.mask.view(k // 4, 4, c, -1).sum(1) == 2).all()
    report = report_mask(made.mask)
    assert (report.structure, report.dgrad_ratio) == ("2:4", "2:4")
    rule = structure("transposable")
    assert rule.has(made.mask)
    assert not rule.has(choose(score, 0.5, "2:4").mask)
    assert float(score[made.mask].sum()) <= float(score[choose(score, 0.5, "2:4").mask].sum())


@settings(max_examples=25)
@given(st.sampled_from([(2, 4), (1, 4), (2, 8)]), st.sampled_from([0.0, 0.1, 0.3, 1.0]), SEEDS)
def test_an_exchange_keeps_what_stays_and_the_ratio(ratio, share, seed):
    n, m = ratio
    generator = torch.Generator().manual_seed(seed)
    weight, growth = (torch.rand(16, 8, 3, 1, generator=generator) for _ in range(2))
    rule = structure("transposable", m=m, n=n)
    mask = rule.choose(weight, 1 - n / m).mask
    new = rule.exchange(mask, None, weight, growth, share).mask
    assert rule.has(new)
    kept = int(mask.sum())
    stay = kept - min(round(share * kept), mask.numel() - kept)
    assert bool(new[mask & (weight >= weight[mask].sort().values[kept - stay] if stay else mask)].all()) or not stay
    assert share or torch.equal(new, mask)


def test_mixed_precision_makes_masks_no_coarser():
    """Those of the forward are those that anything else sees of the weight."""
    made, score = structure("transposable"), torch.rand(32, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        within = made.mask(score, 0.5)
    assert torch.equal(within, made.mask(score, 0.5))


def test_a_model_trains_with_it():
    torch.manual_seed(0)
    model = hrbp.sparsify(
        hrbp.models.build("resnet8", classes=4), 0.5, structure="transposable", distribution="uniform"
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evolver = hrbp.Evolver(model, optimizer, "rigl", total_steps=4, every=1)
    before = {name: layer.mask() for name, layer in sparse_layers(model).items()}
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        evolver.step()
    rule = structure("transposable")
    assert all(rule.has(layer.mask()) for layer in sparse_layers(model).values())
    assert any(not torch.equal(layer.mask(), before[name]) for name, layer in sparse_layers(model).items())
    for method in ("ste", "sr-ste"):
        hrbp.sparsify(hrbp.models.build("resnet8", classes=4), 0.5, structure="transposable", method=method)


def test_refusals():
    with pytest.raises(ValueError, match=r"m = 4 does not divide K = 6"):
        hrbp.make_mask(torch.rand(6, 8, 3, 3), 0.5, structure="transposable")
    with pytest.raises(ValueError, match=r"make_mask\('transposable n:m'\): sparsity is 0\.6"):
        hrbp.make_mask(torch.rand(8, 8, 3, 3), 0.6, structure="transposable")
