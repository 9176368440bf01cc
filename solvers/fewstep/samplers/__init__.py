"""Solvers for diffusion models, one file a family: each turns a grid of noise levels into a plan."""
