"""Profiling: the table of kernels as models of one operator, timed here or on a device, and fitted into costs."""

from qgraph.profiling.measure import profile, table

__all__ = ["profile", "table"]
