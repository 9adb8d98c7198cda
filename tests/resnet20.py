"""CIFAR-10 ResNet-20 as a plain function, with the weights of a PyTorch file, without PyTorch."""

import collections
import os
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradnorm_jax as gj

PREPROCESS = "squash=32,mean=imagenet,std=imagenet"


def logits(params, images):
    """Logits `[B, 10]` of images `[B, 32, 32, 3]`, with shortcuts of option A."""
    x = jax.nn.relu(_normalise(params, "bn1", _convolve(images, params["conv1.weight"])))
    for stage in (1, 2, 3):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _block(params, f"layer{stage}.{block}", x, stride)
    return x.mean((1, 2)) @ params["linear.weight"].T + params["linear.bias"][None]


def _block(params, name, x, stride):
    y = _convolve(x, params[f"{name}.conv1.weight"], stride)
    y = jax.nn.relu(_normalise(params, f"{name}.bn1", y))
    y = _normalise(params, f"{name}.bn2", _convolve(y, params[f"{name}.conv2.weight"]))
    wider = (y.shape[-1] - x.shape[-1]) // 2
    shortcut = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (wider, wider)))
    return jax.nn.relu(shortcut + y)


def _convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def _normalise(params, name, x):
    weight, bias, mean, variance = (
        params[f"{name}.{key}"][None, None, None]
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) * (weight * jax.lax.rsqrt(variance + 1e-5)) + bias


def build(weights):
    """The model with the weights of `resnet20-12fca82f.th`, and its preprocessing."""
    params = read_state_dict(weights)
    return gj.from_apply(logits, params, np.zeros((2, 32, 32, 3), np.float32)), PREPROCESS


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The float32 arrays of a PyTorch file in the format from before version 1.6."""
    with open(path, "rb") as file:
        for _ in range(3):  # magic number, version of the protocol, machine
            _Unpickler(file).load()
        tensors = _Unpickler(file).load()["state_dict"]
        storages = {}
        for key in _Unpickler(file).load():
            count = int.from_bytes(file.read(8), "little")
            storages[key] = np.frombuffer(file.read(4 * count), np.float32)
    return {
        name.removeprefix("module."): storages[tensor.storage][tensor.offset :][
            : int(np.prod(tensor.shape))
        ].reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


class _Tensor(NamedTuple):
    storage: str
    offset: int
    shape: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads nothing but dictionaries of tensors."""

    def persistent_load(self, reference):
        return reference[2]

    def find_class(self, module, name):
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                return lambda storage, offset, shape, *_: _Tensor(storage, offset, shape)
            case "torch", "FloatStorage":
                return None
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")
