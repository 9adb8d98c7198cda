"""Whether a stream of inputs still looks in-distribution: a test to be read after every input.

The hypothesis is that calibration inputs and all inputs of the stream are exchangeable, as
independent draws from one distribution are; what is tested of them is their scores. The test is a
conformal test martingale. It rejects an exchangeable stream, however long, with probability at most
alpha.

The p-value of an input is the rank of its score among the calibration scores *and those of all
earlier inputs of the stream*, with ties broken at random. Such p-values are independent and
uniform. The p-values of `conformal_p_values`, each against the calibration scores alone, are not:
given one calibration set they all err in the same direction, a martingale of them ends up by
detecting that a finite calibration set is not its distribution, and a long stream is sure to be
rejected. The price of exactness is that a change must be found before the stream has made it usual.

Exchangeable means in no particular order too: frames of a video, or one class after another, are
rejected rightly.

References:
    Vovk, Gammerman, Shafer (2005), "Algorithmic Learning in a Random World".
    Vovk, Petej, Nouretdinov, Ahlberg, Carlsson, Gammerman (2021), "Retrain or Not Retrain:
    Conformal Test Martingales for Change-Point Detection", arXiv:2102.10439.
    Shaer, Bar, Prinster, Romano (2026), "Testing for Distribution Shifts with Conditional Conformal
    Test Martingales", arXiv:2602.13848: the way that is not gone here, calibration scores alone
    with an allowance for how few they are.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.calibration.martingale import Martingale, init_martingale, update_martingale

_BLOCK = 256


class DriftState(NamedTuple):
    """What is kept of a stream.

    Attributes:
        scores: all of them, those of the calibration included, in sorted arrays each of which is
            at most half as long as the one before.
        martingale: the evidence so far; `martingale.seen` inputs have been seen.
        seed: of the numbers that break ties.
    """

    scores: tuple[np.ndarray, ...]
    martingale: Martingale
    seed: int


class Drift(NamedTuple):
    """What is said after each of a batch of inputs.

    Attributes:
        p_value: `[B]`, of the hypothesis that all inputs up to this one and the calibration inputs
            are exchangeable; never rises. P(it is ever <= a) <= a, so that one may look at it after
            every input and stop at will.
        log_wealth: `[B]`, the log of the martingale; `p_value` is exp(-its maximum so far), or 1.
        rank: `[B]`, the smoothed conformal p-value of each input among all earlier ones, uniform on
            (0, 1); low is out-of-distribution.
    """

    p_value: np.ndarray
    log_wealth: np.ndarray
    rank: np.ndarray


def init_drift(calibration_scores: ArrayLike, seed: int = 0) -> DriftState:
    """The state before the first input of a stream.

    >>> state = init_drift(calibrated.calibration_scores)
    >>> for images in stream:
    ...     state, drift = update_drift(state, calibrated.score(images))
    ...     if drift.p_value[-1] <= 0.01:
    ...         ...  # the stream no longer looks in-distribution

    Args:
        calibration_scores: `[n]`, in any order; more of them find smaller changes.
        seed: of the numbers that break ties. The same seed gives the same results, in batches of
            any size.

    Raises:
        ValueError: `calibration_scores` is not `[n]` with n >= 1, or holds what is not finite.
    """
    scores = np.sort(_checked(calibration_scores, "calibration_scores"))
    if not scores.size:
        raise ValueError("calibration_scores must be [n] with n >= 1, got none")
    return DriftState((scores,), init_martingale(), seed)


def update_drift(state: DriftState, scores: ArrayLike) -> tuple[DriftState, Drift]:
    """Takes in the next inputs of a stream.

    In a stream of n inputs, calibration included, each costs O(log^2 n) time.

    Args:
        state: after the earlier inputs.
        scores: `[B]`, in the order of the stream.

    Returns:
        The state after them, and what is said after each.

    Raises:
        ValueError: `scores` is not `[B]`, or holds what is not finite.
    """
    new = _checked(scores, "scores")
    bag, martingale = state.scores, state.martingale
    generator = np.random.PCG64(state.seed).advance(martingale.seen)
    uniforms = np.random.Generator(generator).random(len(new))
    ranks = np.empty(len(new))
    seen = sum(map(len, bag))
    for start in range(0, len(new), _BLOCK):
        part = slice(start, start + _BLOCK)
        ranks[part] = _ranks(bag, new[part], uniforms[part], seen + start)
        bag = _insert(bag, np.sort(new[part]))
    after, log_wealth = update_martingale(martingale, ranks)
    peaks = np.maximum.accumulate(np.maximum(log_wealth, martingale.log_peak))
    return DriftState(bag, after, state.seed), Drift(np.exp(-peaks), log_wealth, ranks)


def _ranks(
    bag: tuple[np.ndarray, ...], new: np.ndarray, uniforms: np.ndarray, seen: int
) -> np.ndarray:
    """(how many are below + U (how many are equal)) / how many, itself included, for each."""
    row, column = new[:, None], new[None, :]
    below = np.tril(column < row, -1).sum(axis=1)
    at_most = np.tril(column <= row).sum(axis=1)
    for scores in bag:
        below = below + np.searchsorted(scores, new, side="left")
        at_most = at_most + np.searchsorted(scores, new, side="right")
    total = seen + 1 + np.arange(len(new))
    # 1 - U is never 0, and a quotient that rounds to 1 is not either.
    return np.minimum((below + (1 - uniforms) * (at_most - below)) / total, np.nextafter(1, 0))


def _insert(bag: tuple[np.ndarray, ...], new: np.ndarray) -> tuple[np.ndarray, ...]:
    """The sorted arrays with another among them; merging costs O(log n) each, on average."""
    while bag and len(bag[-1]) < 2 * len(new):
        new = np.sort(np.concatenate([bag[-1], new]), kind="stable")
        bag = bag[:-1]
    return (*bag, new)


def _checked(scores: Any, name: str) -> np.ndarray:
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be [n] finite numbers, got shape {array.shape} with "
            f"{np.count_nonzero(~np.isfinite(array))} that are not: leave those out"
        )
    return array
