"""Classifiers of any make as a `gradnorm_jax.types.Model`: Linen, NNX, a plain function."""
