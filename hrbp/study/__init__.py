"""What do many trainings, side by side, come to?

runner.py is what studies share: a folder that can be taken up again, times measured in turns. A study is a file here
that runs it, and one that makes a table of what it came to.
"""

from .regularity import Regularity
from .study import Study
from .study_table import rows, sentences, table
from .variants import PRESETS, PUBLISHED, TABLE_1, Variant

__all__ = ["PRESETS", "PUBLISHED", "TABLE_1", "Regularity", "Study", "Variant", "rows", "sentences", "table"]
