"""What held-out in-distribution scores say about a new one, exactly and for any network.

All of it rests on one assumption: the calibration inputs and a new in-distribution input are
exchangeable, as independent draws from one distribution are. Training data are not exchangeable
with new data: calibrate on inputs that neither the network nor the detector has seen.

References:
    Vovk, Gammerman, Shafer (2005), "Algorithmic Learning in a Random World".
    Bates, Candès, Lei, Romano, Sesia (2023), "Testing for Outliers with Conformal p-values",
    arXiv:2104.08279.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradnorm_jax.metrics.intervals import Estimate, check_options
from gradnorm_jax.numerics import to_common_dtype, to_float32_at_least


def conformal_p_values(calibration_scores: ArrayLike, scores: ArrayLike) -> jax.Array:
    r"""How unusual scores are among those of held-out in-distribution (ID) inputs.

    .. math:: p(s) = \frac{1 + \#\{i : s_i \le s\}}{n + 1}

    For a new ID input P(p <= a) <= a at any level a, on average over calibration sets of any size
    n. Ties count as unusual as can be, so the guarantee holds with them too. No p-value is below
    1 / (n + 1).

    Args:
        calibration_scores: `[n]`, in any order; higher is more in-distribution.
        scores: of new inputs, of any shape.

    Returns:
        p-values in (0, 1], in the shape of `scores`; low is out-of-distribution, NaN where the
        score is NaN.

    Raises:
        ValueError: `calibration_scores` is not `[n]` with n >= 1, or holds what is not finite.

    References:
        Vovk, Gammerman, Shafer (2005), "Algorithmic Learning in a Random World".
        Bates et al. (2023), arXiv:2104.08279.
    """
    calibration, new = to_common_dtype(_checked(calibration_scores), scores)
    at_most = jnp.searchsorted(jnp.sort(calibration), new, side="right")
    p_values = (at_most + 1).astype(new.dtype) / (calibration.size + 1)
    return jnp.where(jnp.isnan(new), jnp.nan, p_values)


def threshold_at_tpr(
    calibration_scores: ArrayLike, tpr: float = 0.95, *, confidence: float | None = None
) -> jax.Array:
    """The threshold that in-distribution (ID) inputs reach with probability `tpr` at least.

    It is the m-th lowest of n calibration scores. Without `confidence`, m = floor((1 - tpr)(n + 1))
    and the guarantee is on average over calibration sets: a score is below the threshold if and
    only if its conformal p-value is at most 1 - tpr. With it, m is the largest for which
    P(Binomial(n, 1 - tpr) >= m) >= confidence: then the true positive rate of this very threshold
    is at least `tpr`, unless the calibration set is among the unlucky fraction 1 - confidence.

    `gradnorm_jax.metrics.threshold_at_tpr` describes the scores at hand instead; it promises
    nothing about new ones.

    Args:
        calibration_scores: `[n]`, in any order; higher is more in-distribution.
        tpr: true positive rate, ID being the positive class, in (0, 1); read as the decimal number
            it is written as.
        confidence: in (0, 1); None for the guarantee on average.

    Returns:
        A scalar; an input is in-distribution if and only if its score is >= this.

    Raises:
        ValueError: `tpr` or `confidence` is out of range, or the scores are too few for them.

    References:
        Wilks (1941), "Determination of Sample Sizes for Setting Tolerance Limits".
        Bates et al. (2023), arXiv:2104.08279.
    """
    scores = _checked(calibration_scores)
    return jnp.sort(scores)[threshold_rank(scores.size, tpr, confidence) - 1]


def threshold_rank(count: int, tpr: float, confidence: float | None = None) -> int:
    """Which of `count` scores, from the lowest as 1 on, is the threshold of `threshold_at_tpr`."""
    if not 0 < tpr < 1:
        raise ValueError(f"tpr must be above 0 and below 1, got {tpr}")
    level = 1 - Fraction(str(tpr))
    if confidence is None:
        rank = math.floor(level * (count + 1))
        needed = math.ceil(1 / level) - 1
    else:
        from scipy.special import bdtr  # SciPy comes with JAX, and takes a while to import

        check_options(confidence)
        fewer = np.arange(count, dtype=np.float64)  # P(Binomial >= m) = 1 - P(Binomial <= m - 1)
        rank = int((bdtr(fewer, count, float(level)) <= 1 - confidence).sum())
        needed = math.ceil(math.log1p(-confidence) / math.log(tpr))
    if not rank:
        how = "" if confidence is None else f" with confidence {confidence:g}"
        raise ValueError(
            f"{count} calibration scores are too few for tpr={tpr:g}{how}: give at least {needed}, "
            "or ask for less"
        )
    return rank


def tpr_interval(passed: int, total: int, confidence: float = 0.95) -> Estimate:
    """The true positive rate of a threshold that `passed` of `total` ID inputs reach.

    The interval is Clopper and Pearson's, which covers the rate with at least this confidence
    whatever the rate is, if the threshold does not depend on the inputs. At the m-th lowest of
    `total` continuous scores themselves, `passed` = total - m + 1 gives an interval that covers the
    rate of that threshold as surely; with ties its lower end does.

    Args:
        passed: how many inputs reach the threshold.
        total: how many there are, at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: they are out of range.

    References:
        Clopper, Pearson (1934), "The Use of Confidence or Fiducial Limits".
    """
    from scipy.special import betaincinv

    check_options(confidence)
    if not 0 <= passed <= total or total < 1:
        raise ValueError(f"passed must be from 0 to total, and total above 0: {passed}, {total}")
    tail = (1 - confidence) / 2
    missed = total - passed
    low = betaincinv(passed, missed + 1, tail) if passed else 0.0
    high = betaincinv(passed + 1, missed, 1 - tail) if missed else 1.0
    return Estimate(passed / total, float(low), float(high))


def benjamini_hochberg(p_values: ArrayLike, fdr: float = 0.05) -> jax.Array:
    """Which of a batch of inputs to call out-of-distribution at a false-discovery rate.

    Of those called so, at most the fraction `fdr` are in-distribution, on average over batches and
    calibration sets. All inputs with p <= p_(k) are called so, where k is the largest with
    p_(k) <= k fdr / B.

    Conformal p-values of one batch share their calibration scores and so depend on each other.
    They do so positively (PRDS) if the inputs are independent and scores continuous, and the rate
    holds; given one calibration set, it may be exceeded. It does not hold if the inputs depend on
    each other, as frames of one video do.

    Args:
        p_values: `[B]`, in [0, 1]; one that is NaN is not called anything, and counts in B.
        fdr: in (0, 1).

    Returns:
        `[B]` bool, whether to call the input out-of-distribution.

    Raises:
        ValueError: `fdr` is out of range, or `p_values` is not `[B]`.

    References:
        Benjamini, Hochberg (1995), "Controlling the False Discovery Rate".
        Bates et al. (2023), arXiv:2104.08279.
    """
    check_fdr(fdr)
    p_values = to_float32_at_least(jnp.asarray(p_values))
    if p_values.ndim != 1:
        raise ValueError(f"p_values must be [B], one for each input, got shape {p_values.shape}")
    ascending = jnp.sort(p_values)
    limits = jnp.arange(1, p_values.size + 1).astype(p_values.dtype) * fdr / max(p_values.size, 1)
    largest = jnp.where(ascending <= limits, ascending, -1.0).max(initial=-1.0)
    return p_values <= largest


def check_fdr(fdr: float) -> None:
    """ValueError if it is out of range."""
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must be above 0 and below 1, got {fdr}")


def _checked(calibration_scores: Any) -> jax.Array:
    scores = to_float32_at_least(jnp.asarray(calibration_scores))
    if scores.ndim != 1 or not scores.size:
        raise ValueError(
            f"calibration_scores must be [n], one for each of n >= 1 inputs, got {scores.shape}"
        )
    if not isinstance(scores, jax.core.Tracer) and not np.isfinite(scores).all():
        raise ValueError("calibration_scores must be finite: leave out or mend those that are not")
    return scores
