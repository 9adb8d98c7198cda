"""Weights files of any framework as arrays by key, and where public ones are.

Nothing that is in a file is run. What the keys mean is told by the layouts of
`gradnorm_jax.models`.
"""
