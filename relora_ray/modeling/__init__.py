"""Models and what trains them, below any method: architectures, losses, optimizers, schedules, ranks."""
