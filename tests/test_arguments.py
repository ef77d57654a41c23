"""Names are accepted in any case, and what is no share or no structure is refused in a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hrbp
from hrbp.arguments import any_case, check_sparsity
from hrbp.density import densities
from hrbp.layers.record import record_of
from hrbp.layers.view import sparse_layers
from hrbp.saliencies import SALIENCIES
from hrbp.structures.registry import STRUCTURES, structure
from hrbp.structures.regrouping import regroup


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))


def score(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (16, 16, 3, 3), generator=torch.Generator().manual_seed(0))


def test_any_case():
    assert any_case(" RigL", ("set", "rigl")) == "rigl"
    assert any_case("what", ("set", "rigl")) == "what"
    assert any_case(None, ("set", "rigl")) is None


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name):
    for spelling in (name.upper(), name.title(), f" {name} "):
        assert structure(spelling) == structure(name)


def test_ratios():
    assert structure(" 2 : 4 ") == structure("2:4")
    for name, message in [
        ("4:2", "structure[(][)]: 4:2 would keep 4 of every 2 weights; n:m needs 1 <= n <= m; 2:4 keeps 2 of 4"),
        ("0:4", "0:4 would keep 0 of every 4 weights; n:m needs 1 <= n <= m$"),
        ("4:0", "4:0 would keep 4 of every 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            hrbp.make_mask(score(), 0.5, name)
        with pytest.raises(ValueError, match=message):
            hrbp.sparsify(net(), 0.5, structure=name)
    with pytest.raises(ValueError, match="4:2 would keep"):
        structure("n:m", m=2, n=4)


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_every_door_of_sparsify_takes_any_case(saliency):
    batch = (torch.randn(2, 32, 6, 6), torch.zeros(2, 6, 6, dtype=torch.long))
    plain, shouted = (
        hrbp.sparsify(net(), 0.5, structure=s, saliency=t, distribution=d, batch=batch)
        for s, t, d in (("hrbp++", saliency, "erk"), ("HRBP++", saliency.upper(), "ERK"))
    )
    assert record_of(plain) == record_of(shouted)
    for a, b in zip(sparse_layers(plain).values(), sparse_layers(shouted).values(), strict=True):
        assert torch.equal(a.mask(), b.mask())
    assert all(layer.row_order() is None for layer in sparse_layers(shouted).values()) is (saliency == "random")


def test_other_doors_take_any_case():
    assert record_of(hrbp.sparsify(net(), 0.5, structure="2:4", method="SR-STE")).method == "sr-ste"
    assert hrbp.saliency(net(), ["0"], "Magnitude").keys() == {"0"}
    assert densities({"a": (8, 8)}, 0.5, "Uniform") == {"a": 0.5}
    assert torch.equal(regroup(score(), 0.5, method="Paper").mask(), regroup(score(), 0.5, method="paper").mask())
    model = hrbp.models.build("ResNet8", classes=3)
    assert model._hrbp_network["name"] == "resnet8"
    assert hrbp.models.narrow("RESNET8", 10_000, classes=3)._hrbp_network["name"] == "resnet8"


DOORS = {
    "sparsify": lambda s: hrbp.sparsify(net(), s),
    "make_mask": lambda s: hrbp.make_mask(score(), s, "kernel"),
    "regroup": lambda s: regroup(score(), s),
    "saliency": lambda s: hrbp.saliency(net(), ["0"], sparsity=s),
    "densities": lambda s: densities({"a": (8, 8)}, s),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_sparsity_is_refused_in_a_sentence(door):
    for value, message in [
        ("0.9", r"sparsity is '0.9'; it needs a number in \[0, 1\), not a string"),
        (90, r"sparsity is 90; it needs a number in \[0, 1\); 90% is 0.9"),
        (1.0, r"sparsity is 1.0; it needs a number in \[0, 1\)"),
        (-0.1, r"sparsity is -0.1; it needs a number"),
        (float("nan"), "sparsity is nan; it needs a number"),
        (None, "sparsity is None; it needs a number"),
        ([0.9], r"sparsity is \[0.9\]; it needs a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            DOORS[door](value)
    for value in (0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 0, False):
        check_sparsity(value, "x()")


def test_what_is_no_name_is_refused_in_a_sentence():
    for arguments, message in [
        ({"structure": "hrbq"}, "no structure 'hrbq'"),
        ({"structure": None}, "no structure None"),
        ({"structure": ["hrbp"]}, r"no structure \['hrbp'\]"),
        ({"saliency": "size"}, "saliency is 'size'; it needs one of auto, random, magnitude"),
        ({"saliency": None}, "saliency is None; it needs one of auto, random"),
        ({"distribution": 3}, "distribution is 3; it needs one of"),
        ({"method": "rigl"}, "method is 'rigl'; it needs one of ste, sr-ste, subp, or None"),
    ]:
        with pytest.raises(ValueError, match=message):
            hrbp.sparsify(net(), 0.5, **arguments)
    with pytest.raises(ValueError, match=r"score is a ndarray; it needs a torch.Tensor"):
        hrbp.make_mask(np.ones((8, 8, 3, 3)), 0.5, "kernel")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("n:m", {"m": "4"}, "m is '4'; it needs an integer"),
        ("n:m", {"n": "banana"}, "n is 'banana'; it needs an integer"),
        ("1xn", {"n": 4.0}, "n is 4.0; it needs an integer"),
        ("1xn", {"n": None}, "n is None; it needs an integer"),
        ("1xn", {"uniform": "false"}, "uniform is 'false'; it needs True or False"),
        ("block", {"blocksize": "88"}, r"blocksize is '88'; it needs a pair \(bk, bc\) of integers"),
        ("block", {"blocksize": (8, "8")}, "blocksize is"),
        ("block", {"blocksize": 8}, "blocksize is 8"),
        ("hrbp", {"groups": "x"}, "groups is 'x'; it needs an integer"),
        ("hrbp++", {"tap_density": "half"}, "tap_density is 'half'; it needs a number"),
        ("hrbp", {"balanced": "yes"}, "balanced is 'yes'; it needs True or False"),
        ("elementwise", {"min_rows": None}, "min_rows is None; it needs an integer"),
    ],
)
def test_options_of_structures_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        structure(name, **options)
    assert structure("hrbp", row_granule=None, balanced=True)
    assert structure("1xn", uniform=1, rearrange=0) == structure("1xn", uniform=True)
    assert structure("n:m", n=None, m=np.int64(4))
    assert structure("block", blocksize=[8, 4]) == structure("block", blocksize=(8, 4))
