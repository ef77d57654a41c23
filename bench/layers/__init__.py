"""Benchmarks of single convolutions: which layers and patterns, what is compared, how one layer is measured."""
