"""When to sample and how to reuse: what was tried, and what it gave."""
