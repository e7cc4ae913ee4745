"""Sweeps: many runs that differ in a few settings, what they are and what came of them.

space.py says which runs they are, results.py what they came to; runtime/sweep.py trains them.
"""
