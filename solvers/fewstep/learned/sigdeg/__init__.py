"""Sig-DEG: few-step samplers and SDE steps that read the partial signature (arXiv 2508.16939)."""
