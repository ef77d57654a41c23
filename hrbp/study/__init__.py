"""How do structures and methods compare?

runner.py is what studies share: trainings that can be resumed, folder.py their files, timing.py interleaved step times.
A study is a file here that runs it, and a file that makes its table.
"""

from .regularity import Regularity
from .study import Study
from .study_table import rows, sentences, table
from .variants import PRESETS, PUBLISHED, TABLE_1, Variant

__all__ = ["PRESETS", "PUBLISHED", "TABLE_1", "Regularity", "Study", "Variant", "rows", "sentences", "table"]
