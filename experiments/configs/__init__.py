"""Configurations: every number of a run, as plain Python files."""
