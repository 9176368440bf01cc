"""Solvers learned from a fine teacher; each is initialised to reproduce the solver it improves."""
