"""The named workloads, which `anyup tune` shares: see `anyup.bench.workloads`."""

from anyup.bench.workloads import CURVE, REACH, UNIFICATION, WORKLOADS, Workload, find, square

__all__ = ["CURVE", "REACH", "UNIFICATION", "WORKLOADS", "Workload", "find", "square"]
