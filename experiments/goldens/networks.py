"""Features, logits and GradNorm of networks in PyTorch, float64, for weights from a formula.

Writes `tests/models/goldens/NAME.npz`, which `tests/models/test_goldens.py` reads, with the keys
and shapes of the weights. The networks are torchvision's and timm's, and two written here from the
papers. Run where these are installed: `python experiments/goldens/networks.py [NAME...]`.
"""

# ruff: noqa: D102, D107

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from formula import named_weights, numbers, vit_shapes
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional
from torchvision.models import resnet

FOLDER = Path(__file__).parents[2] / "tests" / "models" / "goldens"
CLASSES = 10


class PreActivation(nn.Module):
    """Batch normalisation, ReLU and convolution, twice: a layer of DenseNet-BC or WideResNet."""

    def __init__(self, inputs, inner, outputs, sizes, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inner, sizes[0], stride, sizes[0] // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, sizes[1], 1, sizes[1] // 2, bias=False)

    def forward(self, x):
        x = self.conv1(functional.relu(self.bn1(x)))
        return self.conv2(functional.relu(self.bn2(x)))


class Dense(PreActivation):
    """A layer of DenseNet-BC: what it makes is put behind what it is given."""

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Wide(PreActivation):
    """A unit of WideResNet: where channels change, its shortcut begins after the activation."""

    def __init__(self, inputs, outputs, stride):
        super().__init__(inputs, outputs, outputs, (3, 3), stride)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        shortcut = x
        if hasattr(self, "convShortcut"):
            shortcut = self.convShortcut(functional.relu(self.bn1(x)))
        return shortcut + super().forward(x)


class Block(nn.Module):
    """Layers under the name that the files give them."""

    def __init__(self, layers):
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x):
        return self.layer(x)


class Transition(nn.Module):
    """Half the channels, half the pixels on a side."""

    def __init__(self, channels):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x):
        return functional.avg_pool2d(self.conv1(functional.relu(self.bn1(x))), 2)


class CifarNetwork(nn.Module):
    """A stem, modules by name, batch normalisation, ReLU, pooling, head."""

    def __init__(self, stem, modules, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.names = list(modules)
        for name, module in modules.items():
            setattr(self, name, module)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.conv1(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(functional.relu(self.bn1(x)).mean((2, 3)))


def densenet_bc(depth, growth=12):
    """DenseNet-BC for CIFAR."""
    channels, modules = 2 * growth, {}
    for number in (1, 2, 3):
        layers = []
        for _ in range((depth - 4) // 6):
            layers.append(Dense(channels, 4 * growth, growth, (1, 3)))
            channels += growth
        modules[f"block{number}"] = Block(layers)
        if number < 3:
            modules[f"trans{number}"] = Transition(channels)
            channels //= 2
    return CifarNetwork(2 * growth, modules, channels)


def wide_resnet(depth, widen=2):
    """WideResNet for CIFAR."""
    channels, modules = 16, {}
    for number in (1, 2, 3):
        units = []
        for index in range((depth - 4) // 6):
            width = 16 * widen * 2 ** (number - 1)
            units.append(Wide(channels, width, 2 if number > 1 and index == 0 else 1))
            channels = width
        modules[f"block{number}"] = Block(units)
    return CifarNetwork(16, modules, channels)


def small_resnet(depths):
    """OpenOOD's network for 32 x 32 images, made of torchvision's."""
    network = resnet.ResNet(resnet.BasicBlock, depths, num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def option_a_resnet(depth):
    """Torchvision's blocks with shortcuts that are thinned and padded."""
    blocks = (depth - 2) // 6
    network = resnet.ResNet(resnet.BasicBlock, [blocks] * 3 + [1], num_classes=CLASSES)
    network.inplanes = 16
    network.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    network.bn1 = nn.BatchNorm2d(16)
    network.maxpool, network.layer4 = nn.Identity(), nn.Identity()
    for index, name in enumerate(("layer1", "layer2", "layer3")):
        layer = network._make_layer(
            resnet.BasicBlock, 16 * 2**index, blocks, stride=1 + (index > 0)
        )
        if index:
            layer[0].downsample = OptionA(16 * 2**index)
        setattr(network, name, layer)
    network.linear, network.fc = nn.Linear(64, CLASSES), nn.Identity()
    network.register_forward_hook(lambda module, inputs, output: module.linear(output))
    return network


class OptionA(nn.Module):
    """Every other pixel, and zeros before and after the channels."""

    def __init__(self, channels):
        super().__init__()
        self.padding = channels // 4

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


def vit(depth, width, heads, size):
    """Timm's Vision Transformer."""
    return VisionTransformer(
        img_size=size, embed_dim=width, depth=depth, num_heads=heads, num_classes=CLASSES
    )


def vit_from_npz(depth, width, heads, size):
    """The same, with weights that timm reads from a file in the official layout."""
    network = vit(depth, width, heads, size)
    network.official = vit_shapes(depth, width, heads, size, CLASSES)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file.name, **named_weights(network.official))
        # In float64, although timm makes float32 networks.
        network.double().load_pretrained(file.name)
    return network


basic = functools.partial(resnet.ResNet, resnet.BasicBlock, num_classes=CLASSES)
bottleneck = functools.partial(resnet.ResNet, resnet.Bottleneck, num_classes=CLASSES)
densenet = functools.partial(torchvision.models.DenseNet, num_classes=CLASSES)
NETWORKS = {
    # name: network, its last layer, side of the images
    "resnet_basic": (lambda: basic([1, 1, 1, 1]), "fc", 64),
    "resnet_bottleneck": (lambda: bottleneck([1, 1, 1, 1]), "fc", 64),
    "resnet_wide": (lambda: bottleneck([1, 1, 1, 1], width_per_group=128), "fc", 64),
    "resnet_cifar": (lambda: small_resnet([1, 1, 1, 1]), "fc", 32),
    "resnet_option_a": (lambda: option_a_resnet(14), "linear", 32),
    "densenet": (lambda: densenet(8, (2, 2, 2, 2), 16), "classifier", 64),
    "densenet_cifar": (lambda: densenet_bc(16), "fc", 32),
    "wide_resnet_cifar": (lambda: wide_resnet(16), "fc", 32),
    "vit": (lambda: vit(2, 192, 3, 48), "head", 48),
    "vit_npz": (lambda: vit_from_npz(2, 192, 3, 48), "head", 48),
    "mobilenet_v2_torch": (
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES),
        "classifier.1",
        64,
    ),
    "squeezenet1_1": (
        lambda: torchvision.models.squeezenet1_1(num_classes=CLASSES),
        "classifier.1",
        64,
    ),
    "resnet18": (lambda: basic([2, 2, 2, 2]), "fc", 64),
    "resnet34": (lambda: basic([3, 4, 6, 3]), "fc", 64),
    "resnet50": (lambda: bottleneck([3, 4, 6, 3]), "fc", 64),
    "resnet101": (lambda: bottleneck([3, 4, 23, 3]), "fc", 64),
    "wide_resnet50_2": (lambda: bottleneck([3, 4, 6, 3], width_per_group=128), "fc", 64),
    "densenet121": (lambda: densenet(32, (6, 12, 24, 16), 64), "classifier", 64),
    "resnet18_cifar": (lambda: small_resnet([2, 2, 2, 2]), "fc", 32),
    "resnet110_cifar": (lambda: option_a_resnet(110), "linear", 32),
    "densenet101_cifar": (lambda: densenet_bc(100), "fc", 32),
    "wide_resnet40_2_cifar": (lambda: wide_resnet(40), "fc", 32),
    "vit_ti16": (lambda: vit(12, 192, 3, 224), "head", 224),
    "vit_s16": (lambda: vit(12, 384, 6, 224), "head", 224),
    "vit_b16": (lambda: vit(12, 768, 12, 224), "head", 224),
}


def fill(network):
    """Weights from the formula, in place; their shapes by key."""
    if hasattr(network, "official"):
        return network.official
    state = network.state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if v.is_floating_point()}
    weights = named_weights(shapes)
    network.load_state_dict({k: torch.from_numpy(w) for k, w in weights.items()}, strict=False)
    return shapes


def run(network, last, size):
    """Features (of a linear last layer), logits, and the 1-norm of its kernel's gradient."""
    images = torch.from_numpy(numbers((2, size, size, 3), seed=0)).permute(0, 3, 1, 2)
    inputs = []
    layer = network.get_submodule(last)
    network.requires_grad_(False)
    layer.weight.requires_grad_(True)
    hook = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    logits = network(images)
    hook.remove()
    kl = -logits.log_softmax(-1).mean(-1) - np.log(CLASSES)
    norms = [
        torch.autograd.grad(each, layer.weight, retain_graph=True)[0].abs().sum() for each in kl
    ]
    arrays = {"logits": logits, "gradnorm": torch.stack(norms)}
    if isinstance(layer, nn.Linear):
        arrays["features"] = inputs[0]
    return {name: array.detach().numpy() for name, array in arrays.items()}


def main():
    """Writes goldens."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NETWORKS:
        build, last, size = NETWORKS[name]
        network = build().double().eval()
        shapes = fill(network)
        arrays = run(network, last, size)
        keys = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
        np.savez_compressed(FOLDER / f"{name}.npz", shapes=keys, **arrays)
        print(name, arrays["gradnorm"], arrays["logits"].std(-1), flush=True)


if __name__ == "__main__":
    print(torch.__version__, torchvision.__version__, timm.__version__)
    main()
