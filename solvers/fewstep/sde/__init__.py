"""Solvers for stochastic differential equations, one method per file."""
