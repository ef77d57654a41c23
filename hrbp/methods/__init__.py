"""How does a mask change while a model trains?

`Evolver` is the door to all methods. A method is a file here with what it computes (subp.py), its options and their
defaults in options.py, and its case in evolver.py.
"""

from .drift import Update
from .evolver import Evolver
from .options import METHODS

__all__ = ["METHODS", "Evolver", "Update"]
