"""Fitted tables: every weight and level of a plan, fitted to a fine teacher through the unrolled sampler."""
