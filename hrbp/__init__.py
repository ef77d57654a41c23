"""Sparse CNN training on top of blocksparse: structures, regrouping, sparse models, masks that change, training.

import hrbp

model = hrbp.models.build("resnet32", classes=10, width=2)
hrbp.sparsify(model, 0.9, structure="hrbp++")       # in place; print(hrbp.summary(model))
# ... any training loop, or hrbp.train ...
hrbp.densify(model)                                 # a plain dense model that computes the same
"""

from blocksparse import __version__

from . import data, models
from .density import densities
from .formats.model import dense_state_dict, load, save
from .formats.onnx_file import export_onnx
from .methods.evolver import Evolver
from .reports.health import layer_health
from .reports.model_summary import summary
from .saliencies import saliency
from .structures.grouping import Grouping
from .structures.registry import STRUCTURES, choose, make_mask
from .structures.regrouping import regroup
from .surgery.conversion import densify, release, sparsify, to_semi_structured
from .surgery.fusion import fuse
from .surgery.innermost import to_batch_last
from .surgery.prune import from_prune
from .surgery.semi_training import train_semi_structured
from .surgery.training_fusion import fuse_training
from .training.run import train
from .training.settings import Settings
from .training.trainer import Trainer

__all__ = [
    "STRUCTURES",
    "Evolver",
    "Grouping",
    "Settings",
    "Trainer",
    "__version__",
    "choose",
    "data",
    "dense_state_dict",
    "densify",
    "densities",
    "export_onnx",
    "from_prune",
    "fuse",
    "fuse_training",
    "layer_health",
    "load",
    "make_mask",
    "models",
    "regroup",
    "release",
    "saliency",
    "save",
    "sparsify",
    "summary",
    "to_batch_last",
    "to_semi_structured",
    "train",
    "train_semi_structured",
]
