"""Speed and memory, measured.

`pytest benchmarks`, `python -m benchmarks.reach`, `python -m benchmarks.report`.
"""
