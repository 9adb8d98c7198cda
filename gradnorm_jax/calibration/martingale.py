"""Evidence against p-values being uniform and independent, which may be read after every one.

A gambler starts with 1 and bets on each p-value before it is seen, at fair odds: a bet on a density
f on (0, 1) multiplies its stake by f(p). If p-values are independent and uniform, the wealth is a
martingale of mean 1, whatever the bets are, and by Ville's inequality

    P(the wealth ever reaches 1 / alpha) <= alpha.

References:
    Ville (1939), "Étude critique de la notion de collectif".
    Vovk, Nouretdinov, Gammerman (2003), "Testing Exchangeability On-Line".
    Vovk (2021), "Testing Randomness Online", arXiv:1906.09256.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_SHAPES = np.array(
    [(1 / 8, 1), (1 / 2, 1), (1, 2), (1, 1 / 2), (2, 1), (1 / 2, 1 / 2), (2, 2)], np.float64
)
"""Beta densities: p-values low (very, quite, rather), high, near both ends, in the middle."""
_FRACTIONS = np.array([0.1, 1.0])
"""How much of its stake a bet risks on each p-value; little suits what few of them show."""
_NUM_BETS = len(_SHAPES) * len(_FRACTIONS)
_LOG_NORMALISERS = np.array(
    [math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b) for a, b in _SHAPES]
)


class Martingale(NamedTuple):
    """The gambler after some p-values.

    Attributes:
        seen: how many they were.
        log_stakes: `[K]`, log of the money on each bet; the rest, 1 / sqrt(1 + seen), is cash.
        log_peak: log of the largest wealth so far, >= 0.
    """

    seen: int
    log_stakes: np.ndarray
    log_peak: float

    @property
    def p_value(self) -> float:
        """At most alpha once the wealth has reached 1 / alpha: a p-value at any time."""
        return math.exp(-self.log_peak)


def init_martingale() -> Martingale:
    """Before the first p-value: all is in cash."""
    return Martingale(0, np.full(_NUM_BETS, -np.inf), 0.0)


def update_martingale(state: Martingale, p_values: ArrayLike) -> tuple[Martingale, np.ndarray]:
    r"""Bets on p-values, one after another.

    The wealth is a mixture over the moment k at which p-values cease to be uniform, with weight
    1 / sqrt(k) - 1 / sqrt(k + 1), and over K ways in which they do: before p-value t, cash goes
    down from 1 / sqrt(t) to 1 / sqrt(t + 1), and what is taken joins the stakes in K equal parts;
    then each stake is multiplied by its density. So p-values that are uniform for long cost little:
    about 1.5 log k + log 2K nats of the log wealth.

    .. math:: f(p) = 1 - c + c \, \mathrm{Beta}(p; a, b)

    Args:
        state: after the earlier p-values.
        p_values: `[B]`, in (0, 1). Under the hypothesis they must be uniform and independent of all
            earlier ones; merely P(p <= a) <= a is not enough, because high ones are evidence too.

    Returns:
        The state after them, and `[B]` the log of the wealth (nats) after each.

    Raises:
        ValueError: a p-value is not in (0, 1), or they are not `[B]`.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p > 0) & (p < 1)).all():
        raise ValueError(f"p_values must be [B] and above 0 and below 1, got {p}")
    seen, stakes = state.seen, state.log_stakes
    log_wealth = np.empty(len(p))
    for i, log_density in enumerate(_log_densities(p)):
        seen += 1
        cash = (seen + 1) ** -0.5
        taken = seen**-0.5 - cash
        stakes = np.logaddexp(stakes, math.log(taken / _NUM_BETS)) + log_density
        log_wealth[i] = np.logaddexp(math.log(cash), np.logaddexp.reduce(stakes))
    peak = float(log_wealth.max(initial=state.log_peak))
    return Martingale(seen, stakes, peak), log_wealth


def _log_densities(p: np.ndarray) -> np.ndarray:
    """Logs of f of p-values `[B]` for all bets, `[B, K]`."""
    below, above = (_SHAPES - 1).T
    logs = np.outer(np.log(p), below) + np.outer(np.log1p(-p), above) - _LOG_NORMALISERS
    mixed = np.log1p(_FRACTIONS * np.expm1(logs)[..., None])
    return mixed.reshape(len(p), _NUM_BETS)
