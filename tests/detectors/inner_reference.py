"""A small network, and its inner detectors from the papers' formulas, one image after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import special, stats
from sklearn.linear_model import LogisticRegression

from gradnorm_jax.scores.projection import random_direction, random_rows
from gradnorm_jax.statistics.gram_ranges import is_held_out
from gradnorm_jax.tree import leaves_by_name

CLASSES, CHANNELS, SIZE = 4, 6, 6
PARTS = ("stem", "block1", "block2", "last")


def make_params(dtype, seed=0):
    rng = np.random.default_rng(seed)

    def conv(fan_in, fan_out):
        kernel = rng.normal(size=(3, 3, fan_in, fan_out)) / np.sqrt(9 * fan_in)
        return {"kernel": kernel, "bias": rng.normal(size=fan_out) / 5}

    def norm():
        return {
            "scale": 1 + rng.normal(size=CHANNELS) / 5,
            "bias": rng.normal(size=CHANNELS) / 5,
        }

    params = {
        "stem": conv(3, CHANNELS),
        "block1": {"norm": norm(), "conv": conv(CHANNELS, CHANNELS)},
        "block2": {"norm": norm(), "conv": conv(CHANNELS, CHANNELS)},
        "last": {"norm": norm()},
        "head": {
            "kernel": rng.normal(size=(CHANNELS, CLASSES)),
            "bias": rng.normal(size=CLASSES),
        },
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def make_images(count, dtype, seed=1, scale=1.0):
    images = np.random.default_rng(seed).normal(size=(count, SIZE, SIZE, 3))
    images += 0.5 * (np.arange(count) % CLASSES)[:, None, None, None]
    return jnp.asarray(scale * images, dtype)


def network(params, images):
    """Features and logits of images `[B, H, W, 3]`."""
    return forward(params, images)[:2]


def forward(params, images, probes=None):
    """Features, logits and by name the outputs of layers and parts, to which probes are added."""
    seen = {}

    def tap(name, x):
        seen[name] = x if probes is None else x + probes[name]
        return seen[name]

    def conv(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        return y + p["bias"][None, None, None]

    def norm(name, p, x):
        mean = x.mean(axis=-1, keepdims=True)
        factor = lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        factor = factor * p["scale"][None, None, None]
        return tap(name, (x - mean) * factor + p["bias"][None, None, None])

    x = tap("after:stem", jax.nn.relu(conv(params["stem"], images)))
    for name in ("block1", "block2"):
        inner = jax.nn.relu(norm(f"{name}/norm", params[name]["norm"], x))
        x = tap(f"after:{name}", x + conv(params[name]["conv"], inner))
    x = tap("after:last", jax.nn.relu(norm("last/norm", params["last"]["norm"], x)))
    features = x.mean(axis=(1, 2))
    return features, features @ params["head"]["kernel"] + params["head"]["bias"][None], seen


class Loop:
    """The detectors of one network, an image at a time, by `jax.grad` alone."""

    def __init__(self, params, train, labels):
        self.params, self.labels = params, np.asarray(labels)
        self.train = train
        self.kernel = np.asarray(params["head"]["kernel"], np.float64)
        self.bias = np.asarray(params["head"]["bias"], np.float64)

    @functools.cached_property
    def _outputs(self):
        return jax.jit(lambda image: forward(self.params, image[None]))

    def features(self, image):
        return np.asarray(self._outputs(image)[0][0], np.float64)

    def logits(self, image):
        return np.asarray(self._outputs(image)[1][0], np.float64)

    def part(self, name, image):
        return np.asarray(self._outputs(image)[2][name][0], np.float64).mean(axis=(0, 1))

    @functools.cache  # noqa: B019
    def _input_gradient(self, score):
        return jax.jit(jax.grad(lambda image: score(forward(self.params, image[None])[1][0])))

    @functools.cache  # noqa: B019
    def _cotangents(self, scalar):
        def value(probes, image):
            features, logits, _ = forward(self.params, image[None], probes)
            return scalar(features[0], logits[0])

        shapes = jax.eval_shape(lambda image: forward(self.params, image[None])[2], self.train[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        gradient = jax.jit(jax.grad(value))
        return lambda image: {
            name: np.asarray(g[0], np.float64) for name, g in gradient(zeros, image).items()
        }

    def odin(self, image, std=(0.5, 0.25, 0.2)):
        gradient = self._input_gradient(_log_confidence_of_temperature)(image)
        moved = image + 0.002 * jnp.sign(gradient) / jnp.asarray(std, image.dtype)[None, None]
        return special.softmax(self.logits(moved) / 10).max()

    def approximate_mass(self, image):
        return -np.linalg.norm(self._input_gradient(jax.nn.logsumexp)(image))

    def pro(self, image, score, steps, epsilon):
        found = []
        for _ in range(steps):
            found.append(float(score(jnp.asarray(self.logits(image)))))
            image = image - epsilon * jnp.sign(self._input_gradient(score)(image))
        return min(*found, float(score(jnp.asarray(self.logits(image)))))

    def map(self, name, image):
        """The activations `[channels, positions]` of a part."""
        found = np.asarray(self._outputs(image)[2][name][0], np.float64)
        return found.reshape(-1, found.shape[-1]).T

    @functools.cached_property
    def _logits_with_probes(self):
        return jax.jit(lambda image, probes: forward(self.params, image[None], probes)[1][0])

    def rankfeat(self, image):
        seen, found = self._outputs(image)[2], []
        for name in ("after:block2", "after:last"):
            u, s, vt = np.linalg.svd(self.map(name, image))
            first = (s[0] * np.outer(u[:, 0], vt[0])).T.reshape(seen[name].shape)
            probes = jax.tree.map(jnp.zeros_like, seen) | {name: jnp.asarray(-first)}
            found.append(np.asarray(self._logits_with_probes(image, probes), np.float64))
        return special.logsumexp(np.mean(found, axis=0))

    def _grams(self, image):
        """By layer, of the first three powers the rows' sums of whole Gram matrices."""
        found = []
        for name in ("after:block2", "after:last"):
            powers = [self.map(name, image) ** p for p in (1, 2, 3)]
            sums = [(x @ x.T).sum(axis=1) for x in powers]
            roots = [np.sign(g) * np.abs(g) ** (1 / p) for p, g in enumerate(sums, 1)]
            found.append(np.concatenate(roots))
        return np.array(found)

    @functools.cached_property
    def _train_grams(self):
        held_out = is_held_out(np.arange(len(self.train)), 0.3)
        grams = np.array([self._grams(image) for image in self.train])
        predicted = np.array([self.logits(image).argmax() for image in self.train])
        return grams, predicted, held_out

    def _deviations(self, gram, predicted, per_class):
        grams, others, held_out = self._train_grams
        known = grams[~held_out & ((others == predicted) | (not per_class))]
        low, high = known.min(axis=0), known.max(axis=0)
        off = np.maximum(low - gram, 0) / np.abs(low + 1e-6)
        return (off + np.maximum(gram - high, 0) / np.abs(high + 1e-6)).sum(axis=1)

    @functools.cache  # noqa: B019
    def _mean_deviations(self, per_class):
        grams, predicted, held_out = self._train_grams
        pairs = zip(grams[held_out], predicted[held_out], strict=True)
        return 1e-7 + np.mean([self._deviations(*pair, per_class) for pair in pairs], axis=0)

    def gram(self, image, per_class=True):
        z = self.logits(image)
        off = self._deviations(self._grams(image), z.argmax(), per_class)
        return -(off / self._mean_deviations(per_class)).sum() / special.softmax(z).max()

    def _shift(self, image):
        gradient = np.asarray(self._input_gradient(jnp.max)(image)).reshape(-1)
        least = np.argsort(np.abs(gradient), kind="stable")[: int(0.05 * gradient.size)]
        step = np.zeros_like(gradient)
        step[least] = np.sign(gradient[least])
        h = self.features(image)
        moved = self.features(image + 0.5 * jnp.asarray(step.reshape(image.shape)))
        order = np.argsort(-h)
        first, two = order[:2], order[:3]
        return 10 * np.abs(h - moved)[first].sum() + np.maximum(moved, 0)[two].sum()

    @functools.cached_property
    def _shifts(self):
        return np.array([self._shift(image) for image in self.train])

    def adascale(self, image, variant):
        below = (self._shifts <= self._shift(image)).mean()
        percentile = 20 + (1 - below) * 60
        h = np.maximum(self.features(image), 0)
        count = len(h) - round(len(h) * percentile / 100)
        ratio = h.sum() / np.sort(h)[::-1][:count].sum()
        z = self.logits(image) * ratio**2
        if variant == "A":
            z = (h * np.exp(ratio)) @ self.kernel + self.bias
        return special.logsumexp(z)

    _NORMS = ("block1/norm", "block2/norm", "last/norm")

    def gaia_z(self, image):
        found = self._cotangents(_largest_logit)(image)
        rates = [(found[name] != 0).mean(axis=(0, 1)) for name in self._NORMS]
        return -(np.concatenate(rates) ** 2).mean()

    def gaia_a(self, image):
        found = self._cotangents(_sum_of_features)(image)
        inner = np.concatenate([found[name].mean(axis=(0, 1)) for name in self._NORMS])
        outer = self._cotangents(_sum_of_log_p)(image)["after:last"].mean(axis=(0, 1))
        # Derivatives with respect to features are those with respect to the map, times positions.
        return -(inner**2).mean() / np.abs(SIZE**2 * outer).mean()

    def _neurons(self, image):
        found = self._cotangents(_kl)(image)
        states = []
        for name, alpha in (("after:block2", 50.0), ("after:last", 200.0)):
            product = self.part(name, image) * found[name].mean(axis=(0, 1))
            states.append(special.expit(alpha * product))
        return np.array(states)

    @functools.cached_property
    def _coverage(self):
        below = np.log(np.linspace(1, np.sqrt(1000), 5)) / np.log(1000)
        edges = np.concatenate([below[:-1], [0.5], 1 - below[-2::-1]])
        states = np.array([self._neurons(image) for image in self.train])
        counts = np.zeros((*states.shape[1:], len(edges) - 1))
        for image in np.clip(np.searchsorted(edges, states, "right") - 1, 0, 7):
            for layer, row in enumerate(image):
                for neuron, where in enumerate(row):
                    counts[layer, neuron, where] += 1
        return edges, np.minimum(counts / (0.1 * len(states)), 1)

    def nac(self, image):
        edges, coverage = self._coverage
        where = np.clip(np.searchsorted(edges, self._neurons(image), "right") - 1, 0, 7)
        return np.mean([
            np.mean([coverage[layer, n, w] for n, w in enumerate(row)])
            for layer, row in enumerate(where)
        ])  # fmt: skip

    @functools.cached_property
    def _norms_of(self):
        def loss(params, image):
            return _kl(None, forward(params, image[None])[1][0])

        gradient = jax.jit(jax.grad(loss))

        def norms(image):
            leaves = jax.tree.leaves(gradient(self.params, image))
            return np.log([np.linalg.norm(np.asarray(g, np.float64)) for g in leaves])

        return norms

    @functools.cache  # noqa: B019
    def _parameter_gradient(self, score):
        def value(params, image):
            return score(forward(params, image[None])[1][0])

        return jax.jit(functools.partial(jax.grad(value), self.params))

    def _patches(self, name, image):
        """The rows that the kernel of a block is multiplied by, `[positions, 9 channels]`."""
        inner = np.maximum(self._outputs(image)[2][f"{name}/norm"][0], 0)
        padded = np.pad(np.asarray(inner, np.float64), ((1, 1), (1, 1), (0, 0)))
        windows = [padded[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)]
        return np.concatenate(windows, axis=-1).reshape(SIZE**2, -1)

    @functools.cached_property
    def _input_spaces(self):
        found = {}
        for name in ("block1", "block2"):
            rows = np.concatenate([self._patches(name, image) for image in self.train])
            _, s, vt = np.linalg.svd(rows, full_matrices=False)
            count = 1 + np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)
            found[name] = vt[:count].T
        return found

    def gradorth(self, image):
        gradients = self._parameter_gradient(_kl_of_logits)(image)
        parts = [
            space.T @ np.asarray(gradients[name]["conv"]["kernel"]).reshape(9 * CHANNELS, -1)
            for name, space in self._input_spaces.items()
        ]
        return np.sqrt(sum((part**2).sum() for part in parts))

    def _gradient_row(self, image, score=jnp.sum, select=("block2", "conv")):
        leaves = self._parameter_gradient(score)(image)
        for key in select:
            leaves = leaves[key]
        return np.concatenate([np.ravel(np.asarray(g)) for g in jax.tree.leaves(leaves)])

    @functools.cached_property
    def _gradient_space(self):
        rows = np.array([self._gradient_row(image) for image in self.train])
        means = np.array([rows[self.labels == c].mean(axis=0) for c in range(CLASSES)])
        centre = means.mean(axis=0)
        _, s, vt = np.linalg.svd(means - centre, full_matrices=False)
        count = 1 + np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.8)
        return centre, vt[:count]

    def gradpca(self, image):
        centre, space = self._gradient_space
        row = self._gradient_row(image) - centre
        return ((space @ row) ** 2).sum() / (row**2).sum()

    @functools.cached_property
    def _directions(self):
        """Five random ones of block2's parameters, `[5, P]`."""
        leaves = {
            "block2/" + path: leaf for path, leaf in leaves_by_name(self.params["block2"]).items()
        }
        drawn = [random_direction(3, k, leaves) for k in range(5)]
        rows = [np.concatenate([np.ravel(x) for x in each.values()]) for each in drawn]
        return np.array(rows, np.float64) / np.sqrt(5)

    def _projection(self, image):
        return self._directions @ self._gradient_row(image, jax.nn.logsumexp, ("block2",))

    @functools.cached_property
    def _train_projections(self):
        return np.array([self._projection(image) for image in self.train])

    def gradient_projection(self, image):
        rows = self._train_projections
        return stats.norm.logpdf(self._projection(image), rows.mean(axis=0), rows.std(axis=0)).sum()

    def _jacobian(self, image, sketch):
        if sketch == "directions":
            rows = [self._gradient_row(image, z, ("block2",)) for z in _LOGITS]
            return np.array(rows) @ self._directions.T
        rows = np.array([self._gradient_row(image, z, ("block2", "conv", "bias")) for z in _LOGITS])
        return np.asarray(random_rows(3, 7, CLASSES)) @ rows if sketch == "probes" else rows

    @functools.cache  # noqa: B019
    def _posterior(self, sketch, rank):
        jacobians = [self._jacobian(image, sketch) for image in self.train]
        values, vectors = np.linalg.eigh(sum(j.T @ j for j in jacobians))
        values[: len(values) - rank] = 0
        shrunk = values / (values + 1 / (2 * 0.5**2))
        return 0.5**2 * (np.eye(len(values)) - (vectors * shrunk) @ vectors.T)

    def scod(self, image, sketch=None, rank=4):
        j = self._jacobian(image, sketch)
        return -np.trace(j @ self._posterior(sketch, rank) @ j.T)

    @functools.cached_property
    def _train_norms(self):
        return np.array([self._norms_of(image) for image in self.train])

    def layer_norms(self, image):
        rows = self._train_norms
        return stats.norm.logpdf(self._norms_of(image), rows.mean(axis=0), rows.std(axis=0)).sum()

    def layer_norms_knn(self, image):
        unit = self._train_norms / np.linalg.norm(self._train_norms, axis=1, keepdims=True)
        row = self._norms_of(image)
        return -np.sort(((unit - row / np.linalg.norm(row)) ** 2).sum(axis=1))[2]

    _LAYERS = ("after:block1", "after:block2", "after:last")

    @functools.cached_property
    def _gaussians(self):
        found = []
        for name in self._LAYERS:
            rows = np.array([self.part(name, image) for image in self.train])
            means = np.array([rows[self.labels == c].mean(axis=0) for c in range(CLASSES)])
            centred = rows - means[self.labels]
            found.append((means, np.linalg.inv(centred.T @ centred / len(rows))))
        return found

    @functools.cached_property
    def _steps(self):
        def distance(image, name, means, precision):
            h = forward(self.params, image[None])[2][name][0].mean(axis=(0, 1))
            off = h[None] - means
            return jnp.einsum("cd,de,ce->c", off, precision, off).min()

        return {
            name: jax.jit(jax.grad(functools.partial(
                distance, name=name, means=jnp.asarray(means), precision=jnp.asarray(precision)
            )))
            for name, (means, precision) in zip(self._LAYERS, self._gaussians, strict=True)
        }  # fmt: skip

    def _distances(self, image):
        found = []
        for name, (means, precision) in zip(self._LAYERS, self._gaussians, strict=True):
            gradient = self._steps[name](image)
            moved = image - 0.01 * jnp.where(gradient >= 0, 1.0, -1.0)
            off = self.part(name, moved) - means
            found.append(-min(row @ precision @ row for row in off))
        return np.array(found)

    @functools.cached_property
    def _regression(self):
        gradient = self._input_gradient(_log_confidence)
        moved = [i - 0.05 * jnp.where(gradient(i) > 0, 1.0, -1.0) for i in self.train]
        rows = np.array([self._distances(image) for image in (*self.train, *moved)])
        scale = rows.std(axis=0)
        targets = np.repeat([1, 0], len(self.train))
        fitted = LogisticRegression(tol=1e-12, max_iter=10_000).fit(rows / scale, targets)
        return fitted, scale

    def mahalanobis(self, image):
        fitted, scale = self._regression
        return fitted.decision_function([self._distances(image) / scale])[0]


def _log_confidence(logits):
    return jax.nn.log_softmax(logits).max()


def _log_confidence_of_temperature(logits):
    return jax.nn.log_softmax(logits / 10).max()


def _kl_of_logits(logits):
    return _kl(None, logits)


def _logit(number, logits):
    return logits[number]


_LOGITS = [functools.partial(_logit, c) for c in range(CLASSES)]


def _negative_gen(logits):
    p = jax.nn.softmax(logits)
    return -((p * (1 - p)) ** 0.1).sum()


def _confidence(logits):
    return jax.nn.softmax(logits).max()


def _negative_entropy(logits):
    log_p = jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * log_p).sum()


def _kl(features, logits):
    return -jax.nn.log_softmax(logits).mean() - np.log(CLASSES)


def _largest_logit(features, logits):
    return logits.max()


def _sum_of_features(features, logits):
    return features.sum()


def _sum_of_log_p(features, logits):
    return jax.nn.log_softmax(logits).sum()


SCORES = {
    "odin(temperature=10,epsilon=0.002,input_std=[0.5,0.25,0.2])": Loop.odin,
    "approximate_mass": Loop.approximate_mass,
    "pro": lambda s, x: s.pro(x, _negative_entropy, 2, 0.0014),
    "pro(base=msp)": lambda s, x: s.pro(x, _confidence, 1, 0.003),
    "pro(base=gen)": lambda s, x: s.pro(x, _negative_gen, 3, 1e-4),
    "adascale_a(low=20,high=80,k_shift=0.4,k_activation=0.5)": lambda s, x: s.adascale(x, "A"),
    "adascale_l(low=20,high=80,k_shift=0.4,k_activation=0.5)": lambda s, x: s.adascale(x, "L"),
    "gaia_z": Loop.gaia_z,
    "gaia_a": Loop.gaia_a,
    "nac_layers(layers=2,bins=10,steepness=[50,200],usual=0.1)": Loop.nac,
    "layer_norms": Loop.layer_norms,
    "layer_norms+knn(k=3)": Loop.layer_norms_knn,
    "mahalanobis_layers(layers=3,magnitude=0.01)": Loop.mahalanobis,
    "rankfeat(iterations=400)": Loop.rankfeat,
    "gram(layers=2,powers=3,held_out=0.3)": Loop.gram,
    "gram(layers=2,powers=3,held_out=0.3,per_class=false)": lambda s, x: s.gram(x, False),
    "gradorth(layers=[block1/conv,block2/conv],share=0.9)": Loop.gradorth,
    "layer_gradients(select=block2/conv)+gradpca(share=0.8)": Loop.gradpca,
    "gradient_projection(directions=5,select=block2,seed=3)": Loop.gradient_projection,
    "scod(select=block2/conv/bias,rank=4,prior_std=0.5)": Loop.scod,
    "scod(select=block2/conv/bias,rank=4,prior_std=0.5,probes=7,seed=3)": (
        lambda s, x: s.scod(x, "probes")
    ),
    "scod(select=block2,rank=4,prior_std=0.5,directions=5,seed=3)": (
        lambda s, x: s.scod(x, "directions")
    ),
}
