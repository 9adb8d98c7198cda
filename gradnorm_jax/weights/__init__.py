"""Weights files of any framework as arrays by key, and where public ones are. Nothing is unpickled.

What the keys mean is told by the layouts of `gradnorm_jax.models`.
"""
