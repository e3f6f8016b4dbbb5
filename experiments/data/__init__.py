"""Data sets, from where they are to the batches of an epoch."""
