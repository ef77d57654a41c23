"""BatchNorm's kernels as they are counted: which launches, and what one costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bench.counts import machine
from blocksparse.kernels import gpus
from blocksparse.layout import new

FACTS = ("loop", "outside", "registers", "spills", "shared", "access_bytes")
KINDS = ("norm_statistics", "norm_apply", "norm_sums", "norm_dx")  # two of forward, two of backward, as launched
DTYPES = {"half": torch.float16, "ieee": torch.float32}
WHOLE, PARTIAL = (64, 256, 56, 56), (63, 320, 7, 7)  # chunks that fit, and ones that reach past the end


class NormCase(NamedTuple):
    """One launch, of a BatchNorm with ReLU in training."""

    kind: str
    arch: str
    format: str = "channels_last"
    shape: tuple[int, ...] = WHOLE
    residual: bool = False
    math: str = "half"

    @classmethod
    def of(cls, fields: list[Any]) -> NormCase:
        """From JSON."""
        case = cls(*fields)
        return case._replace(shape=tuple(case.shape))

    def row(self, triton: str) -> dict[str, object]:
        """What names this case in the table of counts."""
        return {
            "kind": self.kind, "target": self.arch, "triton": triton, "format": self.format,
            "shape": list(self.shape), "residual": self.residual, "math": self.math,
        }  # fmt: skip


def launch_of(case: NormCase) -> int:
    """Which of the launches of `call` it is."""
    return KINDS.index(case.kind) % 2


def call(case: NormCase, device: str) -> None:
    """The launches of one direction, on tensors of `device`."""
    from blocksparse.kernels import triton_norm

    triton_norm.units = lambda device: gpus.typical(case.arch).units
    like = torch.empty(0, dtype=DTYPES[case.math], device=device)
    x, y, other = (new(case.shape, like, case.format) for _ in range(3))
    a, b, c, d = torch.empty(4, case.shape[1], device=device).unbind()
    residual, norm = other if case.residual else None, (True, True, 1e-5, 0.1)
    if case.kind in KINDS[:2]:
        triton_norm.forward(x, residual, a, b, c, d, norm, case.format)
    else:
        y_or_none = y if case.residual else None
        triton_norm.backward(other, x, y_or_none, a, b, c, d, norm, case.format, True, case.residual)


def _of(arch: str, all_: bool) -> list[NormCase]:
    """Every launch with and without residual in channels_last; chunks that do not fit, other formats and fp32."""
    cases = [NormCase(kind, arch, residual=True) for kind in KINDS]
    cases += [NormCase(kind, arch, "batch_last") for kind in KINDS]
    if all_:
        cases += [NormCase(kind, arch) for kind in KINDS[1:]]
        cases += [NormCase(kind, arch, "batch_last", residual=True) for kind in KINDS[1:]]
        cases += [NormCase(kind, arch, shape=PARTIAL) for kind in KINDS]
        cases += [NormCase(kind, arch, "contiguous") for kind in KINDS]
        cases += [NormCase(kind, arch, residual=True, math="ieee") for kind in KINDS]
    return cases


SHIPPED = [*_of("sm_90", True), *_of("sm_80", False)]  # the rows of the table, under each Triton


def counts(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel costs: counted.py says what the columns are."""
    program, numbers = machine.sass(kernel.asm["cubin"])
    texts = program.instructions

    def own(loop: range) -> list[str]:
        """Loads of the tensors; what other programs have stored is read past the L1 cache."""
        return [texts[i] for i in loop if machine.name(texts[i]).startswith("LDG") and "STRONG" not in texts[i]]

    main = max(program.loops(), key=lambda loop: (len(own(loop)), -len(loop)))
    moved = [name for i in main if (name := machine.name(texts[i])).startswith(("LDG", "STG"))]
    widths = [
        min([machine.WIDTH[part] for part in name.split(".") if part in machine.WIDTH], default=4) for name in moved
    ]
    whole = [text for text in texts if machine.name(text) not in machine.SKIPPED]
    loop = [texts[i] for i in main if machine.name(texts[i]) not in machine.SKIPPED]
    return {
        "loop": len(loop),
        "outside": len(whole) - len(loop),
        "registers": numbers["registers"],
        "spills": numbers["stack"],
        "shared": kernel.metadata.shared,
        "access_bytes": min(widths),
    }
