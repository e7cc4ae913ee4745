"""Ray: the driver, the worker function and the coordinator. Ray is imported in this package and nowhere else."""
