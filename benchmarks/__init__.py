"""Speed and memory, measured.

`pytest benchmarks`, `python -m benchmarks.report`, `python -m benchmarks.compare`; docs/benchmarks.md explains them.
"""
