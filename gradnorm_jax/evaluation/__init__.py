"""Runs, results and reports: all that has state, files or progress."""
