"""D-ODE: a few numbers per row of a solver's plan, fitted to a finer solver (arXiv 2309.16421)."""
