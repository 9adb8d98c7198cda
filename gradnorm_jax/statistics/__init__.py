"""What detectors learn from in-distribution data, one module for each kind of statistics.

Each has `init`, `update` and `merge`, and what makes a detector's state of the statistics. All are
in float64 NumPy on the host. Merging is exact up to rounding, so that neither the order of images
nor their split over batches and processes matters.
"""
