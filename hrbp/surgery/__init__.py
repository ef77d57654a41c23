"""How does a dense model become a sparse one, and a sparse one dense again?

candidates.py says which layers may become sparse, decision.py what becomes of each, conversion.py does it. Another way
in or out of a sparse model is a file here with one function on a model, as prune.py and fusion.py are.
"""

from .conversion import densify, release, sparsify, to_semi_structured
from .fusion import fuse
from .prune import from_prune
from .semi_training import train_semi_structured
from .training_fusion import fuse_training

__all__ = [
    "densify", "from_prune", "fuse", "fuse_training", "release", "sparsify", "to_semi_structured",
    "train_semi_structured",
]  # fmt: skip
