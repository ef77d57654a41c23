"""Benchmarks: run.py (layers), step.py (training steps), infer.py (inference), launch.py (host time of a call).

calibrate.py fits the cost model of a CPU, model.py shows what is predicted for a GPU, count.py reads compiled kernels,
gpu.py runs all that needs a GPU, page.py makes tables of result files.
Each is started as a file, `python bench/run.py --help`; what they share is in shared/.
"""
