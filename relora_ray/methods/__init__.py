"""How weights are trained: base.py has the interface, and each family its files. Imports nothing: a config names the
method, and base.py finds it."""
