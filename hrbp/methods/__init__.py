"""How does a mask change while a model trains?

`Evolver` is the door to all methods, and the loop that they share. A method is a file here with a class: its options,
what it needs of a model, when its updates are due and what they change (base.py); registry.py finds it.
"""

from .drift import Update
from .evolver import Evolver
from .registry import METHODS

__all__ = ["METHODS", "Evolver", "Update"]
