"""Measurements of mambakit beside its peers: every row checks the answer before it times it."""
