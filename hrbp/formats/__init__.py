"""What do files of weights hold?

Those of other programs are read by weights.py, whatever wrote them; those of this library are sealed (sealed.py) and
hold a model (model.py). Another format of others is one more reader there.
"""

from .model import dense_state_dict, load, save
from .weights import read_weights, write_groupings

__all__ = ["dense_state_dict", "load", "read_weights", "save", "write_groupings"]
