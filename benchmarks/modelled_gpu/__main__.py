"""`python -m benchmarks.modelled_gpu`: the command of `codegen`."""

import os

# Interpreted kernels have no code. This must be said before triton is imported.
os.environ.pop("TRITON_INTERPRET", None)

from benchmarks.modelled_gpu.codegen import main

main()
