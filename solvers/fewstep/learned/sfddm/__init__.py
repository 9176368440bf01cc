"""SFDDM: a diffusion model of T levels distilled to T' levels in one fold (arXiv 2405.14961)."""
