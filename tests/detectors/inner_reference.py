"""A small network, and its inner detectors from the papers' formulas, one image after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import special, stats
from sklearn.linear_model import LogisticRegression

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

    def pro(self, image):
        found = []
        for _ in range(3):
            p = special.softmax(self.logits(image))
            found.append((p * np.log(p)).sum())
            image = image - 0.0014 * jnp.sign(self._input_gradient(_negative_entropy)(image))
        return min(found)

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
    "pro": Loop.pro,
    "adascale_a(low=20,high=80,k_shift=0.4,k_activation=0.5)": lambda s, x: s.adascale(x, "A"),
    "adascale_l(low=20,high=80,k_shift=0.4,k_activation=0.5)": lambda s, x: s.adascale(x, "L"),
    "gaia_z": Loop.gaia_z,
    "gaia_a": Loop.gaia_a,
    "nac_layers(layers=2,bins=10,steepness=[50,200],usual=0.1)": Loop.nac,
    "layer_norms": Loop.layer_norms,
    "layer_norms+knn(k=3)": Loop.layer_norms_knn,
    "mahalanobis_layers(layers=3,magnitude=0.01)": Loop.mahalanobis,
}
