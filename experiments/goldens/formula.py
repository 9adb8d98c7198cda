"""Checkpoints and images from a formula, the same bits on every machine and in every framework."""

import math
import zlib

import numpy as np

# expansion, output channels, stride
MOBILENET_BLOCKS = (
    [(1, 16, 1)]
    + [(6, 24, 2), (6, 24, 1)]
    + [(6, 32, 2)]
    + [(6, 32, 1)] * 2
    + [(6, 64, 2)]
    + [(6, 64, 1)] * 3
    + [(6, 96, 1)] * 3
    + [(6, 160, 2)]
    + [(6, 160, 1)] * 2
    + [(6, 320, 1)]
)


def numbers(shape, seed):
    """Float64 in [-1, 1): the integers `seed * 2**40 + i` through the SplitMix64 finaliser."""
    z = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed << 40)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def bit_shapes(depths, width, classes):
    """Shapes by key of a BiT checkpoint in the published layout."""
    result = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, width)}
    inputs = width
    for block, depth in enumerate(depths):
        inner = width * 2**block
        for unit in range(depth):
            prefix = f"resnet/block{block + 1}/unit{unit + 1:02d}"
            layers = {"a": (1, inputs, inner), "b": (3, inner, inner), "c": (1, inner, 4 * inner)}
            if unit == 0:
                kernel = (1, 1, inputs, 4 * inner)
                result[f"{prefix}/a/proj/standardized_conv2d/kernel"] = kernel
            for letter, (size, fan_in, fan_out) in layers.items():
                layer = f"{prefix}/{letter}"
                result[f"{layer}/standardized_conv2d/kernel"] = (size, size, fan_in, fan_out)
                result[f"{layer}/group_norm/gamma"] = result[f"{layer}/group_norm/beta"] = (fan_in,)
            inputs = 4 * inner
    result["resnet/group_norm/gamma"] = result["resnet/group_norm/beta"] = (inputs,)
    result["resnet/head/conv2d/kernel"] = (1, 1, inputs, classes)
    result["resnet/head/conv2d/bias"] = (classes,)
    return result


def bit_weights(shapes):
    """A BiT checkpoint. Kernels and norms are so small that every epsilon shows in the logits."""
    weights = {}
    for seed, key in enumerate(sorted(shapes), start=1):
        array = numbers(shapes[key], seed)
        if key.endswith("standardized_conv2d/kernel"):
            array = array * 1e-4
        elif key.endswith("gamma"):
            array = 0.02 + 0.01 * array
        elif key.endswith("beta"):
            array = 0.01 * array
        weights[key] = array
    return weights


def mobilenet_shapes(classes):
    """Shapes by key of a MobileNetV2 checkpoint, in order of execution."""
    layers = [(32, 3, 3, 3)]
    inputs = 32
    for expansion, outputs, _ in MOBILENET_BLOCKS:
        inner = expansion * inputs
        if expansion > 1:
            layers.append((inner, 1, 1, inputs))
        layers += [(1, 3, 3, inner), (outputs, 1, 1, inner)]
        inputs = outputs
    layers += [(1280, 1, 1, inputs), (classes, 1, 1, 1280)]
    result = {}
    for number, shape in enumerate(layers):
        depthwise = shape[0] == 1
        key = f"{number:02d}_{'DEPTHWISE_' if depthwise else ''}CONV_2D"
        result[f"{key}_w"] = shape
        result[f"{key}_b"] = shape[3:] if depthwise else shape[:1]
    return result


def mobilenet_weights(shapes):
    """A MobileNetV2 checkpoint whose activations keep their scale and reach both ends of ReLU6."""
    weights = {}
    for seed, key in enumerate(sorted(shapes), start=1):
        shape = shapes[key]
        fan_in = math.prod(shape[1:3] if "DEPTHWISE" in key else shape[1:])
        scale = 2.0 / math.sqrt(fan_in) if key.endswith("_w") else 1.0
        weights[key] = scale * numbers(shape, seed)
    return weights


def named_weights(shapes):
    """Weights by key and shape, each from its key alone, in PyTorch's and in ViT's own names.

    Activations keep their size, and nothing is such that leaving it out would not show.
    """
    return {key: _named(key, shape) for key, shape in shapes.items()}


def vit_shapes(depth, width, heads, size, classes):
    """Shapes by key of a Vision Transformer in the official layout, with patches of 16 pixels."""
    split, blocks = width // heads, {}
    dense = {"Dense_0": (width, 4 * width), "Dense_1": (4 * width, width)}
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            blocks[f"{block}/{name}/scale"] = blocks[f"{block}/{name}/bias"] = (width,)
        for name in ("query", "key", "value"):
            attention = f"{block}/MultiHeadDotProductAttention_1/{name}"
            blocks[f"{attention}/kernel"] = (width, heads, split)
            blocks[f"{attention}/bias"] = (heads, split)
        attention = f"{block}/MultiHeadDotProductAttention_1/out"
        blocks[f"{attention}/kernel"], blocks[f"{attention}/bias"] = (heads, split, width), (width,)
        for name, shape in dense.items():
            blocks[f"{block}/MlpBlock_3/{name}/kernel"] = shape
            blocks[f"{block}/MlpBlock_3/{name}/bias"] = shape[1:]
    return {
        "cls": (1, 1, width),
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, (size // 16) ** 2 + 1, width),
        **blocks,
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }


def _named(key, shape):
    array = numbers(shape, zlib.crc32(key.encode()) % 2**24)
    *_, module, name = ["", *key.replace("/", ".").split(".")]
    if name == "running_var" or (len(shape) == 1 and name in ("weight", "scale")):
        return 1 + array / 4
    if len(shape) == 1 or name in ("bias", "running_mean"):
        return array / 5
    # In ViT's own names the inputs come first; the attention has kernels `[D, heads, D / heads]`.
    inputs = shape[1:]
    if name == "kernel":
        inputs = shape[:1] if module in ("query", "key", "value") else shape[:-1]
    return array * math.sqrt((4 if len(shape) == 4 else 2) / math.prod(inputs))
