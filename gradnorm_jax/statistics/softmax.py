"""The softmax on the host."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of logits `[B, C]`, in float64."""
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
