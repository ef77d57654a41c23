"""The variants of a study, by default and in the HRBP paper, and the numbers of that paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from ..methods.registry import METHODS, method_named
from ..surgery.decision import structure_for

# Groups as the HRBP paper prints them, filters that move and unread channels included; named "paper" in tables.
PAPER_GROUPS: dict[str, float | str] = {
    "groups": 8,
    "min_rows": 8,
    "row_granule": 1,
    "balanced": False,
    "rule": "paper",
}
BASELINES = ("dense", "narrow")  # networks that are not pruned: the full one, and a thin one
PRUNES = "gmp"  # the method that prunes a dense network; halfway and in one step, for `start` "dense"


@dataclass(frozen=True)
class Variant:
    """One way to train; with a sparsity, a line of the table.

    structure     "dense"; "narrow": dense and as thin as it takes to have as many parameters as the sparse networks, or
                  `times` as many, the one option; else as in `sparsify`
    method        how the mask changes, as in `Evolver`
    saliency      what chooses the first mask
    distribution  of the layers' densities
    options       of the structure
    evolve        options of the method, such as the decay of "sr-ste"; they go before those of `Settings`
    start         "scratch"; or "dense": the first half of the training is dense, then the network is pruned by
                  magnitude, once. The second half goes on with the same schedule
    """

    structure: str
    method: str = "static"
    saliency: str = "random"
    distribution: str = "erk"
    options: Mapping[str, float | str] = field(default_factory=dict)
    start: str = "scratch"
    evolve: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Structure and non-default choices, such as "hrbp++ rigl", "narrow 2x", "block from dense"."""
        if self.structure == "narrow" and self.options:
            return f"narrow {self.times:g}x"
        paper = PAPER_GROUPS.items() <= self.options.items()
        named = ["paper"] if paper else []
        named += [
            f"{key}={value if isinstance(value, str) else Fraction(value).limit_denominator(99)}"
            for key, value in self.options.items()
            if not (paper and key in PAPER_GROUPS)
        ]
        ways = [way for way in (self.saliency, self.method) if way not in (Variant.saliency, Variant.method)]
        if self.distribution != Variant.distribution and not self.own_distribution:
            ways.append(self.distribution)
        ways += [f"{key}={value if isinstance(value, str) else f'{value:g}'}" for key, value in self.evolve.items()]
        return " ".join([self.structure, *named, *ways, *([] if self.start == "scratch" else ["from dense"])])

    @property
    def own_distribution(self) -> bool:
        """Whether saliency or method come with a distribution, which the name need not tell."""
        return self.saliency != Variant.saliency or METHODS[self.method].dense_weights

    @property
    def times(self) -> float:
        """A narrow network has so many times the parameters of the sparse ones."""
        return float(self.options.get("times", 1))

    @property
    def record(self) -> dict[str, Any]:
        """As plain values; a choice that came later is left out where it is not made, as in files of before."""
        later = {"start": "scratch", "evolve": {}}
        return {key: value for key, value in asdict(self).items() if key not in later or value != later[key]}

    @property
    def layout(self) -> Variant:
        """The variant whose step time is measured: without mask updates, unless every step makes one.

        Of one that is pruned halfway it is the network after that, with filters in the order that pruning gives them.
        """
        method = self.method if METHODS[self.method].dense_weights else "static"
        saliency = "magnitude" if self.start == "dense" else self.saliency
        return Variant(self.structure, method, saliency, self.distribution, self.options)

    @property
    def updates(self) -> bool:
        """Whether masks change in some steps, which take longer than the others."""
        method = METHODS[self.method]
        return method.changes and not method.dense_weights and "sparsity" not in method.options()

    def refuses(self) -> str | None:
        """Why structure and method do not fit together, or None."""
        method = method_named(self.method, "Study()")
        if reason := method.refuses_options(self.evolve):
            return reason
        if self.start not in ("scratch", "dense"):
            return f"start is {self.start!r}; it needs 'scratch' or 'dense'"
        if self.structure in BASELINES:
            known = {"times"} if self.structure == "narrow" else set()
            if method.changes or self.start != "scratch":
                return "it has no mask"
            if unknown := sorted(self.options.keys() - known):
                return f"{self.structure!r} has no option {', '.join(unknown)}"
            return None if self.times > 0 else f"times is {self.times}; it needs a number > 0"
        if self.start == "dense":
            if method.changes or method.dense_weights:
                return f"it is pruned once, halfway, and method {self.method!r} changes masks; use method='static'"
            return METHODS[PRUNES].refuses(structure_for(METHODS[PRUNES], self.structure, self.options))
        return method.refuses(structure_for(method, self.structure, self.options))


QUICK = tuple(Variant(name) for name in ("dense", "narrow", "unstructured", "hrbp++", "hrbp", "channel"))

TABLE_1 = (
    Variant("dense"),
    Variant("narrow"),
    Variant("unstructured"),
    Variant("channel"),
    Variant("unstructured", saliency="snip", distribution="global"),
    Variant("unstructured", saliency="grasp", distribution="global"),
    Variant("unstructured", "set"),
    Variant("unstructured", "rigl"),
    Variant("elementwise"),
    Variant("hrbp++"),
    Variant("hrbp++", "hrbp"),
)
FAITHFUL = (*TABLE_1, Variant("hrbp++", options=PAPER_GROUPS), Variant("hrbp++", "hrbp", options=PAPER_GROUPS))
IMAGENET = (
    *(Variant(name) for name in ("dense", "narrow", "unstructured", "hrbp++")),
    Variant("hrbp++", options=PAPER_GROUPS),
    *(Variant("unstructured", saliency=name, distribution="global") for name in ("snip", "grasp")),
)
SUBP = (Variant("dense"), *(Variant("1xn", "subp", distribution="uniform", options={"n": n}) for n in (16, 32)))
LAMBDAS = (-2e-3, 0.0, 2e-4, 2e-3, 2e-2)  # of SR-STE; its paper trains with 2e-4, for 120 epochs of ImageNet


def lambda_variants(structures: Sequence[str] = ("n:m",), lambdas: Sequence[float] = LAMBDAS) -> tuple[Variant, ...]:
    """Dense, and each structure with each lambda; 0 is STE. Every layer has the same density: 2:4 everywhere, say."""
    return (
        Variant("dense"),
        *(
            Variant(structure, "sr-ste", distribution="uniform", evolve={"decay": decay}) if decay
            else Variant(structure, "ste", distribution="uniform")
            for structure in structures for decay in lambdas
        ),
    )  # fmt: skip


ABLATION = tuple(Variant("hrbp++", options={"tap_density": taps / 9}) for taps in (1, 3, 5, 7, 9))

# Ma et al., HRBP (CPAL 2024), Table 1 and the ablation over s. Its HRBP has 4 of 9 taps: "hrbp++" here.
# (model, data) -> variant -> sparsity -> accuracy in %, and the speed-up of training on an A100 where there is one.
Published = dict[str, dict[float, tuple[float, float | None]]]


def _table_1(dense: float, *pairs: tuple[float, float]) -> Published:
    names = [variant.name for variant in TABLE_1[2:]]
    sparse: Published = {name: {0.9: (a, None), 0.95: (b, None)} for name, (a, b) in zip(names, pairs, strict=True)}
    return {"dense": {0.0: (dense, None)}, **sparse}


PUBLISHED: dict[tuple[str, str], Published] = {
    ("resnet32", "cifar10"): _table_1(
        94.80, (92.81, 91.38), (90.27, 87.19), (92.59, 91.01), (92.38, 91.39), (92.30, 90.76), (92.84, 92.02),
        (91.63, 90.77), (92.30, 90.84), (92.72, 91.25),
    ),
    ("resnet32", "cifar100"): _table_1(
        74.64, (69.48, 67.03), (62.71, 56.33), (68.89, 65.22), (69.24, 66.50), (69.66, 67.41), (70.98, 68.50),
        (66.97, 64.35), (69.22, 65.94), (69.51, 66.41),
    ),
    ("vgg19", "cifar10"): _table_1(
        94.23, (92.91, 91.91), (90.84, 87.12), (93.63, 93.43), (93.30, 93.04), (92.46, 91.73), (93.15, 92.30),
        (92.81, 91.86), (92.88, 91.66), (93.07, 91.79),
    ),
    ("vgg19", "cifar100"): _table_1(
        74.16, (70.39, 68.63), (59.61, 49.31), (72.84, 71.83), (71.95, 71.23), (72.36, 69.81), (71.63, 69.13),
        (70.52, 68.60), (70.25, 67.89), (70.49, 68.04),
    ),
}  # fmt: skip
for _pair, _name, _speeds in (
    (("resnet32", "cifar10"), "elementwise", (1.1, 1.2)), (("resnet32", "cifar10"), "hrbp++", (1.4, 1.6)),
    (("vgg19", "cifar10"), "elementwise", (1.2, 1.2)), (("vgg19", "cifar10"), "hrbp++", (1.4, 1.9)),
):  # fmt: skip
    for _sparsity, _speed in zip((0.9, 0.95), _speeds, strict=True):
        PUBLISHED[_pair][_name][_sparsity] = PUBLISHED[_pair][_name][_sparsity][0], _speed
for _variant, _accuracies in zip(
    ABLATION, ({0.9: 92.65, 0.95: 91.3}, {0.9: 92.2}, {0.9: 92.3}, {0.9: 92.3}, {0.9: 91.8, 0.95: 89.8}), strict=True
):
    PUBLISHED["resnet32", "cifar10"][_variant.name] = {s: (a, None) for s, a in _accuracies.items()}


PUBLISHED["resnet50", "imagenet"] = {
    "dense": {0.0: (75.70, None)},
    "hrbp++": {0.6: (74.84, 1.17), 0.8: (70.90, 1.26)},
    "unstructured snip": {0.6: (73.95, None), 0.8: (69.67, None)},
    "unstructured grasp": {0.6: (74.02, None), 0.8: (72.06, None)},
}
for _published in PUBLISHED.values():  # the paper's numbers are those of its own groups first of all
    for _name in ("hrbp++", "hrbp++ hrbp"):
        if _name in _published:
            _published[_name.replace("hrbp++", "hrbp++ paper", 1)] = _published[_name]


@dataclass(frozen=True)
class Preset:
    """Defaults of a study."""

    models: Sequence[str]
    width: Mapping[str, float]
    data: Sequence[str]
    variants: Sequence[Variant]
    sparsities: Sequence[float]
    seeds: Sequence[int]
    batch_size: int
    training: Mapping[str, Any]
    epochs: Mapping[str, int] = field(default_factory=dict)  # data -> where they differ from those of `training`


EIGHT = {"groups": 8}  # the paper's; by default there are as many groups as it takes to read every channel
# Balanced groups of trained weights cost a search of 14 s in a layer of 128 filters in 32 groups.
PRUNED = {"balanced": False}
WORTH_QUICK = (
    Variant("dense"),
    *(Variant("narrow", options={"times": n} if n > 1 else {}) for n in (1, 2, 3, 5)),
    Variant("unstructured"),
    Variant("hrbp"),
    Variant("hrbp++"),
    Variant("block"),
)
WORTH = (
    *WORTH_QUICK,
    Variant("hrbp", options=EIGHT),
    Variant("hrbp++", options=EIGHT),
    Variant("elementwise"),
    Variant("1xn", options={"n": 8}),
    Variant("n:m", options={"m": 32}),
    Variant("unstructured", "rigl"),
    Variant("hrbp++", "rigl"),
    Variant("unstructured", start="dense"),
    Variant("hrbp++", options=PRUNED, start="dense"),
)
# HRBP++, one change at a time; the first is what the others are compared with.
CHANGES = (
    Variant("hrbp++"),
    *(Variant("narrow", options={"times": n} if n > 1 else {}) for n in (1, 2, 3)),
    Variant("dense"),
    Variant("unstructured"),
    *(Variant("hrbp++", options={"tap_density": taps / 9}) for taps in (2, 6, 9)),
    Variant("hrbp++", options=EIGHT),
    Variant("hrbp++", options={"groups": 32, "min_rows": 2}),
    *(Variant("hrbp++", saliency=name) for name in ("snip", "grasp", "synflow")),
    *(Variant("hrbp++", name) for name in ("rigl", "hrbp")),
    Variant("hrbp++", distribution="uniform"),
)

PRESETS = {
    "quick": Preset(
        ("resnet8",), {}, ("shapes",), QUICK, (0.9, 0.95), (0, 1), 64, {"epochs": 6, "lr": 0.1, "warmup": 0.5}
    ),
    "paper": Preset(
        ("resnet32", "vgg19"), {"resnet32": 2.0, "resnet56": 2.0}, ("cifar10", "cifar100"), FAITHFUL, (0.9, 0.95),
        (0, 1, 2), 128,
        {"epochs": 160, "lr": 0.1, "schedule": "step", "milestones": (0.5, 0.75), "gamma": 0.1},
    ),
    "imagenet": Preset(  # of the HRBP paper
        ("resnet50",), {}, ("imagenet",), IMAGENET, (0.6, 0.8), (0,), 256,
        {"epochs": 100, "lr": 0.1, "schedule": "step", "milestones": (0.3, 0.6, 0.9), "gamma": 0.1},
    ),
    "subp": Preset(  # as the released code of SUBP has it
        ("resnet34",), {}, ("imagenet",), SUBP, (0.5,), (0,), 256,
        {
            "epochs": 250, "lr": 0.1, "weight_decay": 1e-4, "label_smoothing": 0.1,
            "evolve_options": {"begin": 10 / 250, "until": 180 / 250, "ranks": "live"},
        },
    ),
    "sr-ste": Preset(
        ("resnet8",), {}, ("shapes",), lambda_variants(), (0.5, 0.75), (0, 1, 2, 3, 4), 64,
        {"epochs": 10, "lr": 0.1, "warmup": 0.5}, {"digits": 20, "cifar10": 30, "cifar100": 30},
    ),
    "worth": Preset(
        ("resnet8",), {"resnet8": 2.0, "resnet14": 2.0}, ("shapes", "digits"), WORTH, (0.9, 0.95), (0, 1, 2, 3, 4), 64,
        {"epochs": 5, "lr": 0.2, "warmup": 0.5}, {"cifar10": 30, "cifar100": 30},
    ),
    "ablation": Preset(
        ("resnet8",), {"resnet8": 2.0, "resnet14": 2.0}, ("shapes",), CHANGES, (0.9,), (0, 1, 2, 3, 4), 64,
        {"epochs": 6, "lr": 0.2, "warmup": 0.5}, {"digits": 5, "cifar10": 30, "cifar100": 30},
    ),
}  # fmt: skip
