"""Features and logits of BiT in PyTorch, float64, written from the papers alone.

Prints the numbers that `tests/models/test_bit.py` holds, and how far off each known mistake would
put the logits. Run: `python experiments/goldens/bit.py` where PyTorch is installed.
"""

import functools

import numpy as np
import torch
from formula import bit_shapes, bit_weights, numbers
from torch.nn import functional

CASES = {
    # name: depths, width, groups, classes, image shape
    "small": ((2, 1, 1, 1), 8, 4, 3, (2, 37, 52, 3)),
    "r50x1": ((3, 4, 6, 3), 64, 32, 10, (1, 64, 96, 3)),
}
MISTAKES = (
    "unbiased variance",
    "epsilon of the weights 0",
    "epsilon of the weights 1e-5",
    "epsilon of the norm 1e-6",
    "stem padded as SAME",
    "3x3 padded as SAME",
    "pool padded as SAME",
    "pool padded by minus infinity",
    "stride on the first 1x1",
    "projection of the raw input",
)


def pad_same(x, size, stride, value=0.0):
    """Pads `[B, C, H, W]` as TensorFlow's SAME does: the odd one below and to the right."""
    pads = []
    for length in (x.shape[3], x.shape[2]):
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value)


def forward(weights, images, depths, groups, mistake=None):
    """`(features, logits)` of images `[B, H, W, 3]`."""
    weights = {key: torch.from_numpy(array) for key, array in weights.items()}
    weight_epsilon = {"epsilon of the weights 0": 0.0, "epsilon of the weights 1e-5": 1e-5}
    norm_epsilon = 1e-6 if mistake == "epsilon of the norm 1e-6" else 1e-5

    def convolve(x, scope, stride=1):
        kernel = weights[f"{scope}/standardized_conv2d/kernel"].permute(3, 2, 0, 1)
        size = kernel.shape[-1]
        rows = kernel.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        n = rows.shape[1] - (mistake == "unbiased variance")
        variance = centred.square().sum(1, keepdim=True) / n
        kernel = centred / torch.sqrt(variance + weight_epsilon.get(mistake, 1e-10))
        same = {7: "stem padded as SAME", 3: "3x3 padded as SAME"}.get(size, "") == mistake
        x = pad_same(x, size, stride) if same else functional.pad(x, [size // 2] * 4)
        return functional.conv2d(x, kernel.reshape(-1, x.shape[1], size, size), stride=stride)

    def activate(x, scope):
        scale, shift = (weights[f"{scope}/group_norm/{name}"] for name in ("gamma", "beta"))
        return functional.relu(functional.group_norm(x, groups, scale, shift, eps=norm_epsilon))

    def pool(x):
        if mistake == "pool padded as SAME":
            return functional.max_pool2d(pad_same(x, 3, 2, -torch.inf), 3, 2)
        border = -torch.inf if mistake == "pool padded by minus infinity" else 0.0
        return functional.max_pool2d(functional.pad(x, [1] * 4, value=border), 3, 2)

    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = pool(convolve(x, "resnet/root_block", 2))
    for block, depth in enumerate(depths):
        for unit in range(depth):
            scope = f"resnet/block{block + 1}/unit{unit + 1:02d}"
            stride = 2 if block > 0 and unit == 0 else 1
            early = mistake == "stride on the first 1x1"
            activated = activate(x, f"{scope}/a")
            if unit == 0:
                source = x if mistake == "projection of the raw input" else activated
                x = convolve(source, f"{scope}/a/proj", stride)
            y = convolve(activated, f"{scope}/a", stride if early else 1)
            y = convolve(activate(y, f"{scope}/b"), f"{scope}/b", 1 if early else stride)
            x = x + convolve(activate(y, f"{scope}/c"), f"{scope}/c")
    features = activate(x, "resnet").mean((2, 3))
    head = weights["resnet/head/conv2d/kernel"][0, 0]
    return features.numpy(), (features @ head + weights["resnet/head/conv2d/bias"]).numpy()


def main():
    """Prints goldens and sensitivities."""
    for name, (depths, width, groups, classes, shape) in CASES.items():
        weights = bit_weights(bit_shapes(depths, width, classes))
        run = functools.partial(forward, weights, numbers(shape, seed=0), depths, groups)
        features, logits = run()
        print(name, "features", features[:, :4].tolist(), "logits", logits.tolist())
        for mistake in MISTAKES if name == "small" else ():
            print(f"  {mistake}: {np.abs(run(mistake=mistake)[1] - logits).max():.1e}")


if __name__ == "__main__":
    main()
