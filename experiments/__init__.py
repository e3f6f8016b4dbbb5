"""Training programs around vsam_jax: configurations in, results and figures out."""
