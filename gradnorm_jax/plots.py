"""Plots of scores, from arrays; each returns a matplotlib Figure to show or to save."""
