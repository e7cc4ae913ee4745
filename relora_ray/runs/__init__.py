"""A run: its place in storage, its state, its metrics, what becomes of it when it diverges, and forks of it."""
