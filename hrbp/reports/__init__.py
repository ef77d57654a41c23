"""What does a mask or a model keep, and what does it cost?

A new measure of a mask is a file here and a field of `MaskReport`; a new figure goes into picture.py.
"""

from .mask_report import MaskReport, report_mask
from .model_report import report_model
from .model_summary import summary

__all__ = ["MaskReport", "report_mask", "report_model", "summary"]
