"""Every detector written from its formula, in float64 NumPy.

Each takes what is known of training images and the outputs of others, and returns scores `[B]`.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from scipy import optimize, special, stats
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler, normalize


class Data(NamedTuple):
    """Features `[N, D]`, logits `[N, C]`, labels `[N]`, and the last layer that made the logits."""

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def of(self, features):
        """The same last layer after other features."""
        return self._replace(features=features, logits=features @ self.kernel + self.bias)

    @property
    def predicted(self):
        return self.logits.argmax(axis=1)


def energy(train, test):
    return special.logsumexp(test.logits, axis=1)


def msp(train, test):
    return special.softmax(test.logits, axis=1).max(axis=1)


def max_logit(train, test):
    return test.logits.max(axis=1)


def entropy(train, test):
    return -stats.entropy(special.softmax(test.logits, axis=1), axis=1)


def temperature_scaling(train, test):
    def loss(log_t):
        log_p = special.log_softmax(train.logits / np.exp(log_t), axis=1)
        return -log_p[np.arange(len(log_p)), train.labels].mean()

    bounds = np.log([1 / 64, 64])
    best = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return special.softmax(test.logits / np.exp(best.x), axis=1).max(axis=1)


def gen(train, test):
    p = np.sort(special.softmax(test.logits, axis=1), axis=1)[:, -100:]
    return -(p**0.1 * (1 - p) ** 0.1).sum(axis=1)


def kl_matching(train, test):
    p = special.softmax(train.logits, axis=1)
    templates = [p[train.predicted == c].mean(axis=0) for c in set(train.predicted)]
    q = special.softmax(test.logits, axis=1)
    return -np.min([special.rel_entr(q, t).sum(axis=1) for t in templates], axis=0)


def _distance(features, centre, covariance):
    centred = features - centre
    return np.einsum("bi,ij,bj->b", centred, np.linalg.pinv(covariance, 1e-10), centred)


def mahalanobis(train, test):
    means = {c: train.features[train.labels == c].mean(axis=0) for c in set(train.labels)}
    within = train.features - np.stack([means[c] for c in train.labels])
    covariance = EmpiricalCovariance(assume_centered=True).fit(within).covariance_
    return -np.min([_distance(test.features, m, covariance) for m in means.values()], axis=0)


def relative_mahalanobis(train, test):
    every = EmpiricalCovariance().fit(train.features)
    background = _distance(test.features, every.location_, every.covariance_)
    return mahalanobis(train, test) + background


def _normalized(data):
    return data._replace(features=normalize(data.features))


def mahalanobis_plus_plus(train, test):
    return mahalanobis(_normalized(train), _normalized(test))


def relative_mahalanobis_plus_plus(train, test):
    return relative_mahalanobis(_normalized(train), _normalized(test))


def knn(train, test, k=5):
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normalize(train.features))
    return -(search.kneighbors(normalize(test.features))[0][:, -1] ** 2)


def nnguide(train, test, k=4):
    guides = normalize(train.features) * energy(None, train)[:, None]
    similar = np.sort(normalize(test.features) @ guides.T, axis=1)[:, -k:]
    return energy(None, test) * similar.mean(axis=1)


def _residual_length(train, test):
    origin = -np.linalg.pinv(train.kernel.T) @ train.bias
    covariance = EmpiricalCovariance(assume_centered=True).fit(train.features - origin).covariance_
    _, vectors = np.linalg.eigh(covariance)
    rest = vectors[:, : len(origin) - len(origin) // 2]
    return np.linalg.norm((test.features - origin) @ rest, axis=1)


def residual(train, test):
    return -_residual_length(train, test)


def vim(train, test):
    alpha = train.logits.max(axis=1).mean() / _residual_length(train, train).mean()
    return energy(train, test) - alpha * _residual_length(train, test)


def neco(train, test):
    scaler = StandardScaler().fit(train.features)
    pca = PCA(n_components=0.9, svd_solver="full").fit(scaler.transform(train.features))
    standardised = scaler.transform(test.features)
    inside = np.linalg.norm(pca.transform(standardised), axis=1)
    return inside / np.linalg.norm(standardised, axis=1)


def she(train, test):
    scores = []
    for h, c in zip(test.features, test.predicted, strict=True):
        rows = train.features[(train.labels == c) & (train.predicted == c)]
        scores.append(h @ rows.mean(axis=0) if len(rows) else 0.0)
    return np.array(scores)


def fdbd(train, test):
    mean, scores = train.features.mean(axis=0), []
    for h, z, c in zip(test.features, test.logits, test.predicted, strict=True):
        others = [k for k in range(len(z)) if k != c]
        gaps = [
            abs(z[c] - z[k]) / np.linalg.norm(test.kernel[:, c] - test.kernel[:, k]) for k in others
        ]
        scores.append(np.mean(gaps) / np.linalg.norm(h - mean))
    return np.array(scores)


def nci(train, test):
    centred = test.features - train.features.mean(axis=0)
    along = (test.kernel.T[test.predicted] * centred).sum(axis=1)
    return along / np.linalg.norm(centred, axis=1) + 1e-4 * np.linalg.norm(test.features, 1, axis=1)


def cadref(train, test, score=energy):
    everywhere, scores = train.features.mean(axis=0), []
    logit_scores, mean_score = score(None, test), score(None, train).mean()
    for h, c, s in zip(test.features, test.predicted, logit_scores, strict=True):
        rows = train.features[train.predicted == c]
        error = (h - (rows.mean(axis=0) if len(rows) else everywhere)) * np.sign(test.kernel[:, c])
        above, below = error[error > 0].sum(), -error[error < 0].sum()
        scores.append(-(above / s + below / mean_score) / np.abs(h).sum())
    return np.array(scores)


def cadref_of_gen(train, test):
    def inverse(_, data):
        p = np.sort(special.softmax(data.logits, axis=1), axis=1)[:, -10:]
        return 1 / (p**0.1 * (1 - p) ** 0.1).sum(axis=1)

    return cadref(train, test, inverse)


def react(train, test, score=energy):
    threshold = np.quantile(train.features, 0.9)
    clipped = (data.of(np.minimum(data.features, threshold)) for data in (train, test))
    return score(*clipped)


def react_then_mahalanobis(train, test):
    return react(train, test, mahalanobis)


def react_then_vim(train, test):
    return react(train, test, vim)


def react_then_dice(train, test):
    return react(train, test, dice)


def dice(train, test):
    contributions = train.features.mean(axis=0)[:, None] * train.kernel
    kernel = np.where(contributions > np.quantile(contributions, 0.7), train.kernel, 0)
    return special.logsumexp(test.features @ kernel + test.bias, axis=1)


def _kept(features, sparsity):
    kept = np.zeros_like(features)
    count = features.shape[1] - int(np.round(features.shape[1] * sparsity))
    for row, h in zip(kept, features, strict=True):
        row[np.argsort(-h, kind="stable")[:count]] = 1
    return kept


def _prune(features, sparsity):
    return features * _kept(features, sparsity)


def ash_p(train, test):
    return energy(None, test.of(_prune(test.features, 0.6)))


def ash_b(train, test):
    kept = _kept(test.features, 0.65)
    fill = test.features.sum(axis=1) / kept.sum(axis=1)
    return energy(None, test.of(kept * fill[:, None]))


def ash_s(train, test):
    pruned = _prune(test.features, 0.9)
    ratio = test.features.sum(axis=1) / pruned.sum(axis=1)
    return energy(None, test.of(pruned * np.exp(ratio)[:, None]))


def scale(train, test):
    pruned = _prune(test.features, 0.85)
    ratio = test.features.sum(axis=1) / pruned.sum(axis=1)
    return energy(None, test.of(test.features * np.exp(ratio)[:, None]))


def vra(train, test):
    low, high = np.quantile(train.features, [0.6, 0.95])
    h = test.features
    return energy(None, test.of(np.where(h < low, 0, np.where(h > high, high, h))))


def optfs(train, test):
    left, right = np.quantile(train.features, [0.001, 0.999])
    edges = np.linspace(left, right, 101)
    contributions = train.kernel.T[train.predicted] * train.features
    in_bin = [(train.features >= a) & (train.features < b) for a, b in pairwise(edges)]
    theta = np.array([(contributions * mask).sum(axis=1).mean() for mask in in_bin])
    theta *= 1000 / np.linalg.norm(theta)
    shaped = np.zeros_like(test.features)
    for t, (a, b) in zip(theta, pairwise(edges), strict=True):
        shaped += t * test.features * ((test.features >= a) & (test.features < b))
    return energy(None, test.of(shaped))


def weiper(train, test, repeats=3):
    key, for_signs = jax.random.split(jax.random.key(0, impl="threefry2x32"))
    noise = jax.random.normal(key, train.kernel.shape, np.float32)
    noise = normalize(np.asarray(noise, np.float64), axis=0)
    signs = 2.0 * np.asarray(jax.random.bits(for_signs, (repeats, len(noise)), np.uint32) & 1) - 1
    turns = 2.4 * np.linalg.norm(train.kernel, axis=0) * noise
    turned = [train.kernel + sign[:, None] * turns for sign in signs]

    def logits(data):
        return np.concatenate([data.features @ kernel + data.bias for kernel in turned], axis=1)

    def density(values, low, high):
        return np.histogram(values, 100, (low, high))[0] / len(values)

    def divergence(train_values, values, smoothing, floor):
        low, high = train_values.min(), train_values.max()
        p = np.mean([density(row, low, high) for row in train_values], axis=0) + floor
        p, found = p / p.sum(), []
        for row in values:
            left = (smoothing - 1) // 2
            padded = np.pad(density(row, low, high), (left, smoothing - 1 - left), mode="edge")
            q = np.convolve(padded, np.ones(smoothing) / smoothing, "valid") + floor
            q /= q.sum()
            found.append(special.rel_entr(p, q).sum() + special.rel_entr(q, p).sum())
        return np.array(found)

    parts = np.split(logits(test), repeats, axis=1)
    confidence = np.mean([special.softmax(z, axis=1).max(axis=1) for z in parts], axis=0)
    own = divergence(train.features, test.features, 40, 0.01)
    return 0.25 * confidence - own - 2.5 * divergence(logits(train), logits(test), 15, 0.025)


SCORES = {
    "energy": energy,
    "msp": msp,
    "max_logit": max_logit,
    "entropy": entropy,
    "temperature_scaling": temperature_scaling,
    "gen": gen,
    "kl_matching": kl_matching,
    "mahalanobis": mahalanobis,
    "relative_mahalanobis": relative_mahalanobis,
    "mahalanobis_plus_plus": mahalanobis_plus_plus,
    "relative_mahalanobis_plus_plus": relative_mahalanobis_plus_plus,
    "knn(k=5)": knn,
    "nnguide(k=4)": nnguide,
    "residual": residual,
    "vim": vim,
    "neco": neco,
    "she": she,
    "fdbd": fdbd,
    "nci": nci,
    "cadref": cadref,
    "cadref(logit_score=gen)": cadref_of_gen,
    "weiper(repeats=3)": weiper,
    "react": react,
    "react+energy": react,
    "react+mahalanobis": react_then_mahalanobis,
    "react+vim": react_then_vim,
    "react+dice": react_then_dice,
    "dice": dice,
    "ash_p": ash_p,
    "ash_b": ash_b,
    "ash_s": ash_s,
    "scale": scale,
    "vra": vra,
    "optfs": optfs,
}
