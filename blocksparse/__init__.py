from . import reference
from .geometry import ConvGeometry
from .pattern import BSRPattern
