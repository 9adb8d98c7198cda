"""Scores beside those of pytorch-ood 0.4 (PyTorch), on the same features and logits.

    pip install 'pytorch-ood==0.4.*' && python experiments/goldens/against_pytorch_ood.py

Prints, for each detector that both have, the largest difference of the scores, relative to their
range, and Spearman's rank correlation. Theirs rise with OOD, so they are negated.
"""

import importlib.metadata

import jax
import numpy as np
import torch
from scipy.stats import spearmanr

import gradnorm_jax as gj
from gradnorm_jax.statistics import Examples
from gradnorm_jax.types import Head, LinearHead, Model, Outputs, Variables

NUM_FEATURES, NUM_CLASSES = 64, 10


def make(count, seed, spread=1.0):
    """Rectified features about class means, and labels."""
    means = 1.5 * np.random.default_rng(99).normal(size=(NUM_CLASSES, NUM_FEATURES))
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=count)
    noise = spread * rng.normal(size=(count, NUM_FEATURES))
    return np.maximum(means[labels] + noise, 0).astype(np.float32), labels


FEATURES, LABELS = make(2000, 0)
TEST = np.concatenate([make(500, 1)[0], make(500, 2, spread=2.5)[0]])
RNG = np.random.default_rng(98)
KERNEL = (np.stack([FEATURES[c == LABELS].mean(axis=0) for c in range(NUM_CLASSES)], axis=1)) / 25
KERNEL = (KERNEL + 0.02 * RNG.normal(size=KERNEL.shape)).astype(np.float32)
BIAS = RNG.normal(size=NUM_CLASSES).astype(np.float32) / 10


def ours(spec):
    """Our scores `[N]` of the test features."""
    (detector,) = gj.parse_detectors([spec])
    logits = FEATURES @ KERNEL + BIAS
    examples = Examples(FEATURES, logits, LABELS.astype(np.int32), np.arange(len(LABELS)))
    state = detector.fit and detector.fit.state(LinearHead(KERNEL, BIAS), examples)
    function = jax.tree_util.Partial(lambda variables, x: Outputs(x, x))
    params = {"kernel": jax.numpy.asarray(KERNEL), "bias": jax.numpy.asarray(BIAS)}
    model = Model(function, Variables(params), Head(("kernel",), ("bias",)))
    outputs = Outputs(jax.numpy.asarray(TEST), jax.numpy.asarray(TEST @ KERNEL + BIAS))
    return np.asarray(detector.score(state, model, gj.Batch(None, outputs)), np.float64)


def theirs():
    """Their scores `[N]`, negated, by our spec."""
    from pytorch_ood import detector as d

    head = torch.nn.Linear(NUM_FEATURES, NUM_CLASSES)
    head.weight.data, head.bias.data = torch.tensor(KERNEL.T.copy()), torch.tensor(BIAS)
    train, labels, test = map(torch.tensor, (FEATURES, LABELS, TEST))
    with torch.no_grad():
        logits, train_logits = head(test), head(train)
    identity = torch.nn.Identity()
    maps, train_maps = test[:, :, None, None], train[:, :, None, None]
    flat = torch.nn.Sequential(torch.nn.Flatten(), head)

    def features_of(detector):
        return detector.fit_features(train, labels).predict_features(test)

    yield "msp", d.MaxSoftmax.score(logits)
    yield "energy", d.EnergyBased.score(logits)
    yield "max_logit", d.MaxLogit.score(logits)
    yield "entropy", d.Entropy.score(logits)
    yield "gen", d.GEN.score(logits) * NUM_CLASSES
    gradnorm = d.GradNorm(head, param_filter=lambda name: name == "weight")
    yield "gradnorm", gradnorm.predict(test)
    scaling = d.TemperatureScaling(None)
    yield "temperature_scaling", scaling.fit_logits(train_logits, labels).predict_logits(logits)
    matching = d.KLMatching(None)
    yield "kl_matching", matching.fit_logits(train_logits, labels).predict_logits(logits)
    yield "mahalanobis", features_of(d.Mahalanobis(None)) * 2 * len(train)
    yield "relative_mahalanobis", features_of(d.RMD(None)) * len(train)
    yield "knn", features_of(d.KNN(None, k=50)) ** 2
    yield "vim", features_of(d.ViM(None, 32, head.weight.data, head.bias.data))
    yield "she", features_of(d.SHE(identity, head))
    yield "fdbd", features_of(d.fDBD(identity, head))
    yield "nci", features_of(d.NCI(identity, head, alpha=1e-4))
    yield "nnguide", features_of(d.NNGuide(identity, head, k=10))
    yield "dice", features_of(d.DICE(None, head.weight.data, head.bias.data, 0.7))
    yield (
        "react",
        d.ReAct(identity, flat).fit_feature_maps(train_maps, labels).predict_feature_maps(maps),
    )
    yield (
        "vra(lower_quantile=0.01,upper_quantile=0.99)",
        d.VRA(identity, flat).fit_feature_maps(train_maps, labels).predict_feature_maps(maps),
    )
    for kind, sparsity in (("p", 0.6), ("b", 0.65), ("s", 0.9)):
        ash = d.ASH(identity, flat, f"ash-{kind}", sparsity)
        yield f"ash_{kind}", ash.predict_feature_maps(maps)
    yield "scale", d.SCALE(identity, flat, 0.85).predict_feature_maps(maps)


def main():
    """Prints the table."""
    print(f"pytorch-ood {importlib.metadata.version('pytorch-ood')}")
    print(f"| {'detector':44} | largest difference / range | Spearman |\n|---|---|---|")
    for spec, values in theirs():
        own, other = ours(spec), -values.detach().numpy().astype(np.float64).reshape(-1)
        difference = np.abs(own - other).max() / np.ptp(other)
        print(f"| {spec:44} | {difference:26.1e} | {spearmanr(own, other)[0]:8.6f} |")


if __name__ == "__main__":
    main()
