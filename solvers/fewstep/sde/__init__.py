"""Solvers for stochastic differential equations, one file a method."""
