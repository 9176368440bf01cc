"""Learned steps: each is born equal to its classical parent and distilled from a fine teacher."""
