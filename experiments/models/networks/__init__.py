"""Networks of the comparisons, one family per file; :mod:`..zoo` has their names."""
