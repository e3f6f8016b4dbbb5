"""What an optimizer step costs, whole runs too, beside peers in JAX and PyTorch.

================  ================================================================
``problems``      networks and mini-batches
``variants``      the ways in JAX to make a step, vSAM's and those of its peers
``jax_steps``     compiled programs and the train states that they carry on
``torch_steps``   the same networks' steps in PyTorch (where it is installed)
``rounds``        times of all of them, interleaved
``sweeps``        cost against number of parameters, batch size and window
``whole_runs``    planned runs over whole windows against the sum of their steps
``programs``      memory, copies, time to compile and page faults of programs
``host``          driver, window boundaries, idle device
``report``        tables and figure, made from the JSON alone
================  ================================================================
"""
