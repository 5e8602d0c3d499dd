"""Measurements of a network: layer similarity, similarity over training, cost."""
