"""The metrics themselves, each from two sets of scores."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.metrics import ranked


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Area under the ROC curve: P(id > ood) + P(id = ood) / 2 for a random pair.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.

    Returns:
        In [0, 1], 1 is best, 0.5 is chance.
    """
    return ranked.auroc(ranked.rank(id_scores, ood_scores))


def aupr_in(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with ID as the positive class: the sum of precision x gain in recall.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.

    Returns:
        In (0, 1], 1 is best, about N / (N + M) is chance.
    """
    return ranked.average_precision(ranked.rank(id_scores, ood_scores))


def aupr_out(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with OOD as the positive class, found by low scores.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.

    Returns:
        In (0, 1], 1 is best, about M / (N + M) is chance.
    """
    return ranked.average_precision(ranked.swap(ranked.rank(id_scores, ood_scores)))


def fpr_at_tpr(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    *,
    tpr: float = 0.95,
    positive: Literal["id", "ood"] = "id",
) -> float:
    """Fraction of negatives taken for positives when at least `tpr` of the positives are found.

    The two conventions are different numbers on the same scores. With "id", the paper's, the
    threshold lets 95 % of ID pass and the metric is the fraction of OOD that passes too. With
    "ood", that of OpenOOD and pytorch-ood, the threshold stops 95 % of OOD and the metric is the
    fraction of ID that is stopped too.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.
        tpr: true positive rate to reach, in (0, 1]; read as the decimal number it is written as.
        positive: the class that counts as positive.

    Returns:
        In [0, 1], 0 is best; at the strictest threshold that reaches `tpr`.

    Raises:
        ValueError: `tpr` is outside (0, 1], or `positive` is neither "id" nor "ood".
    """
    if positive not in ("id", "ood"):
        raise ValueError(f'positive must be "id" or "ood", got {positive!r}')
    ranking = ranked.rank(id_scores, ood_scores)
    return ranked.fpr_at_tpr(ranking if positive == "id" else ranked.swap(ranking), tpr)


def threshold_at_tpr(id_scores: ArrayLike, *, tpr: float = 0.95) -> float:
    """The highest score that at least `tpr` of the ID inputs reach.

    Args:
        id_scores: `[N]`.
        tpr: fraction of ID inputs that shall pass, in (0, 1].

    Returns:
        The threshold; an input is in-distribution if and only if its score is >= this.

    Raises:
        ValueError: `tpr` is outside (0, 1].
    """
    descending = np.sort(ranked.check_scores("id_scores", id_scores))[::-1]
    return float(descending[ranked.count_needed(tpr, descending.size) - 1])


def detection_error(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Lowest mean of the two error rates, (P(id stopped) + P(ood passes)) / 2, at any threshold.

    The threshold is chosen on the very scores that it is judged on, so small sets flatter it.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.

    Returns:
        In [0, 0.5], 0 is best.
    """
    return ranked.detection_error(ranked.rank(id_scores, ood_scores))
