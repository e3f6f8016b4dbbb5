"""Networks of the comparisons, one family per file; see :mod:`experiments.models`."""
