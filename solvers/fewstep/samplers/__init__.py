"""Solvers for diffusion models, one file per family: each turns a grid of noise levels into a plan."""
