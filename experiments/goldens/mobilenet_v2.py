"""Features and logits of MobileNetV2 in PyTorch, float64, written from the paper alone.

Prints the numbers that `tests/models/test_mobilenet_v2.py` holds. Run where PyTorch is installed:
`python experiments/goldens/mobilenet_v2.py [WEIGHTS.npz IMAGE...]`.
"""

import sys

import numpy as np
import torch
from formula import MOBILENET_BLOCKS, mobilenet_shapes, mobilenet_weights, numbers
from PIL import Image
from torch.nn import functional


def forward(weights, images):
    """`(features, logits)` of images `[B, H, W, 3]`."""
    kernels = iter([key for key in sorted(weights) if key.endswith("_w")])

    def convolve(x, stride=1):
        key = next(kernels)
        depthwise = "DEPTHWISE" in key
        kernel = torch.from_numpy(weights[key]).double()
        kernel = kernel.permute((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        pads = []
        for length in (x.shape[3], x.shape[2]):
            total = max((-(-length // stride) - 1) * stride + kernel.shape[2] - length, 0)
            pads += [total // 2, total - total // 2]
        bias = torch.from_numpy(weights[key[:-1] + "b"]).double()
        groups = kernel.shape[0] if depthwise else 1
        return functional.conv2d(
            functional.pad(x, pads), kernel, bias, stride=stride, groups=groups
        )

    x = functional.relu6(convolve(torch.from_numpy(images).permute(0, 3, 1, 2), 2))
    for expansion, _, stride in MOBILENET_BLOCKS:
        y = functional.relu6(convolve(x)) if expansion > 1 else x
        y = convolve(functional.relu6(convolve(y, stride)))
        x = x + y if x.shape == y.shape else y
    features = functional.relu6(convolve(x)).mean((2, 3))
    logits = convolve(features[:, :, None, None])[:, :, 0, 0]
    return features.numpy(), logits.numpy()


def load_image(path):
    """Centre crop of 224 pixels, scaled to [-1, 1]."""
    with Image.open(path) as image:
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        crop = image.convert("RGB").crop((left, top, left + 224, top + 224))
    return np.asarray(crop, np.float64) / 127.5 - 1.0


def main():
    """Prints goldens."""
    images = numbers((2, 45, 64, 3), seed=0)
    features, logits = forward(mobilenet_weights(mobilenet_shapes(5)), images)
    print("features", features[:, :4].tolist(), "logits", logits.tolist())
    print("features at 0 and at 6", (features == 0).mean(), (features == 6).mean())
    if len(sys.argv) > 1:
        weights = dict(np.load(sys.argv[1], allow_pickle=False))
        for path in sys.argv[2:]:
            features, logits = forward(weights, load_image(path)[None])
            print(path, logits.argmax(), logits[0, :4].tolist(), features[0, :4].tolist())


if __name__ == "__main__":
    main()
