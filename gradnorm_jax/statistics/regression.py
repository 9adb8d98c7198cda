"""Logistic regression on rows that a bank keeps."""

import numpy as np


def logistic_regression(
    positive: np.ndarray, negative: np.ndarray, *, penalty: float = 1.0
) -> tuple[np.ndarray, float]:
    """Weights `[L]` and bias of the log odds that a row is a positive one.

    As scikit-learn's: the sum of the losses plus penalty / 2 times the squared weights. They are of
    rows divided by their standard deviations, so that no unit matters, and then given for rows as
    they are.

    Args:
        positive: `[N, L]`.
        negative: `[M, L]`.
        penalty: at least zero.

    Raises:
        ValueError: there are no rows of one kind.
    """
    from scipy import optimize, special  # half a second that no other command has to wait

    if not (len(positive) and len(negative)):
        raise ValueError("no training images to fit to; give at least one")
    rows = np.concatenate([positive, negative]).astype(np.float64)
    signs = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    centre, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    scaled = (rows - centre) / scale

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (scaled @ weights + bias)
        slopes = -signs * special.expit(-margins)
        value = np.logaddexp(0, -margins).sum() + penalty / 2 * weights @ weights
        return value, np.append(scaled.T @ slopes + penalty * weights, slopes.sum())

    start = np.zeros(rows.shape[1] + 1)
    options = {"gtol": 1e-8, "ftol": 1e-14, "maxiter": 1000}
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    weights = found[:-1] / scale
    return weights, float(found[-1] - weights @ centre)
