"""The stages of bench/gpu.py: which processes there are, and how they run within their time."""
