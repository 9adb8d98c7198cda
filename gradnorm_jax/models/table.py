"""The table of all networks that are known by name."""

import functools
from collections.abc import Mapping
from typing import Any

from gradnorm_jax.models import (
    bit,
    bit_torch,
    cifar_densenet,
    cifar_resnet,
    densenet,
    mobilenet_v2,
    mobilenet_v2_torch,
    resnet,
    squeezenet,
    vit,
    wide_resnet,
)
from gradnorm_jax.models.architecture import Architecture, Size, WeightsLayout
from gradnorm_jax.models.bit import BiT
from gradnorm_jax.models.cifar_densenet import CifarDenseNet
from gradnorm_jax.models.cifar_resnet import CifarResNet
from gradnorm_jax.models.densenet import DenseNet
from gradnorm_jax.models.mobilenet_v2 import MobileNetV2
from gradnorm_jax.models.mobilenet_v2_torch import TorchMobileNetV2
from gradnorm_jax.models.resnet import ResNet
from gradnorm_jax.models.squeezenet import SqueezeNet
from gradnorm_jax.models.vit import ViT
from gradnorm_jax.models.wide_resnet import WideResNet

_IMAGENET: dict[str, Any] = {"preprocess": "imagenet224", "image_size": 224, "num_classes": 1000}
_CIFAR: dict[str, Any] = {"image_size": 32, "num_classes": 10}
_TORCHVISION: dict[str, Any] = {"source": "torchvision", "license": "BSD-3-Clause"}


_BIT_LAYOUTS = (
    WeightsLayout("bit", bit.layout, bit.remove_numbers),
    WeightsLayout("bit_pytorch", functools.partial(bit_torch.layout, last_norm="head.gn")),
    WeightsLayout("gradnorm_ood", functools.partial(bit_torch.layout, last_norm="before_head.gn")),
)


def _bit(name: str, size: Size, depths: tuple[int, ...], multiplier: int) -> Architecture:
    return Architecture(
        name,
        functools.partial(BiT, depths=depths, width=64 * multiplier),
        bit.HEAD,
        size,
        _BIT_LAYOUTS,
        preprocess="bit480",
        image_size=480,
        num_classes=1000,
        source="google-research/big_transfer",
        license="Apache-2.0",
    )


def _resnet(name: str, size: Size, depths: tuple[int, ...], **options: Any) -> Architecture:
    return Architecture(
        name,
        functools.partial(ResNet, depths=depths, **options),
        resnet.HEAD,
        size,
        (WeightsLayout("torchvision", resnet.layout),),
        **_IMAGENET,
        **_TORCHVISION,
    )


def _cifar_resnet(depth: int, size: Size) -> Architecture:
    return Architecture(
        f"resnet{depth}_cifar",
        functools.partial(CifarResNet, depth=depth),
        cifar_resnet.HEAD,
        size,
        (WeightsLayout("akamaster", cifar_resnet.layout),),
        preprocess="squash=32,mean=imagenet,std=imagenet",
        **_CIFAR,
        source="akamaster/pytorch_resnet_cifar10",
        license="BSD-2-Clause",
    )


def _vit(name: str, width: int, heads: int, parameters: int) -> Architecture:
    return Architecture(
        name,
        functools.partial(ViT, width=width, heads=heads),
        vit.HEAD,
        Size(width, parameters),
        (
            WeightsLayout("vit_jax", vit.layout),
            WeightsLayout("timm", functools.partial(vit.timm_layout, width=width)),
        ),
        preprocess="squash=224,mean=half,std=half",
        image_size=224,
        num_classes=1000,
        source="google-research/vision_transformer",
        license="Apache-2.0",
    )


_R50, _R101, _R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_ROWS = (
    _bit("bit_r50x1", Size(2048, 25_549_352), _R50, 1),
    _bit("bit_r101x1", Size(2048, 44_541_480), _R101, 1),
    _bit("bit_r152x2", Size(4096, 236_335_208), _R152, 2),
    _bit("bit_r50x3", Size(6144, 217_319_080), _R50, 3),
    _bit("bit_r101x3", Size(6144, 387_934_888), _R101, 3),
    _bit("bit_r152x4", Size(8192, 936_533_224), _R152, 4),
    Architecture(
        "bit_tiny",
        functools.partial(BiT, depths=(1, 1, 1, 1), width=16, groups=8),
        bit.HEAD,
        Size(512, 509_594),
        _BIT_LAYOUTS,
        preprocess="bit32",
        **_CIFAR,
    ),
    _resnet("resnet18", Size(512, 11_689_512, 9_600), (2, 2, 2, 2)),
    _resnet("resnet34", Size(512, 21_797_672, 17_024), _R50),
    _resnet("resnet50", Size(2048, 25_557_032, 53_120), _R50, bottleneck=True),
    _resnet("resnet101", Size(2048, 44_549_160, 105_344), _R101, bottleneck=True),
    _resnet("wide_resnet50_2", Size(2048, 68_883_240, 68_224), _R50, bottleneck=True, widen=2),
    Architecture(
        "densenet121",
        DenseNet,
        densenet.HEAD,
        Size(1024, 7_978_856, 83_648),
        (WeightsLayout("torchvision", densenet.layout, densenet.clean),),
        **_IMAGENET,
        **_TORCHVISION,
    ),
    Architecture(
        "squeezenet1_1",
        SqueezeNet,
        None,
        Size(None, 1_235_496),
        (WeightsLayout("torchvision", squeezenet.layout),),
        classifier=squeezenet.CLASSIFIER,
        **_IMAGENET,
        **_TORCHVISION,
    ),
    Architecture(
        "mobilenet_v2_torch",
        TorchMobileNetV2,
        mobilenet_v2_torch.HEAD,
        Size(1280, 3_504_872, 34_112),
        (WeightsLayout("torchvision", mobilenet_v2_torch.layout),),
        **_IMAGENET,
        **_TORCHVISION,
    ),
    Architecture(
        "mobilenet_v2",
        MobileNetV2,
        mobilenet_v2.HEAD,
        Size(1280, 3_489_097),
        (WeightsLayout("tflite", mobilenet_v2.layout),),
        preprocess="crop224",
        image_size=224,
        num_classes=1001,
        label_offset=1,
        source="tensorflow.org, converted from TFLite",
        license="Apache-2.0",
    ),
    _vit("vit_b16", 768, 12, 86_567_656),
    _vit("vit_s16", 384, 6, 22_050_664),
    _vit("vit_ti16", 192, 3, 5_717_416),
    Architecture(
        "resnet18_cifar",
        functools.partial(ResNet, small_images=True),
        resnet.HEAD,
        Size(512, 11_173_962, 9_600),
        (
            WeightsLayout("openood", resnet.openood_layout),
            WeightsLayout("torchvision", resnet.layout),
        ),
        preprocess="squash=32,mean=cifar10,std=0.2470/0.2435/0.2616",
        **_CIFAR,
        source="Jingkang50/OpenOOD",
        license="MIT",
    ),
    _cifar_resnet(20, Size(64, 269_722, 1_376)),
    _cifar_resnet(32, Size(64, 464_154, 2_272)),
    _cifar_resnet(44, Size(64, 658_586, 3_168)),
    _cifar_resnet(56, Size(64, 853_018, 4_064)),
    _cifar_resnet(110, Size(64, 1_727_962, 8_096)),
    Architecture(
        "wide_resnet40_2_cifar",
        WideResNet,
        wide_resnet.HEAD,
        Size(128, 2_243_546, 5_408),
        (WeightsLayout("xternalz", wide_resnet.layout),),
        # 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7 of 255.
        preprocess="squash=32,mean=0.49137/0.48235/0.44667,std=0.24706/0.24353/0.26157",
        **_CIFAR,
        source="xternalz/WideResNet-pytorch",
        license="MIT",
    ),
    Architecture(
        "densenet101_cifar",
        CifarDenseNet,
        cifar_densenet.HEAD,
        Size(342, 769_162, 23_988),
        (WeightsLayout("dice", cifar_densenet.layout),),
        preprocess="squash=32,mean=cifar10,std=cifar10",
        **_CIFAR,
        source="deeplearning-wisc/dice",
        license="MIT",
    ),
)
MODELS: Mapping[str, Architecture] = {row.name: row for row in _ROWS}
"""Every network known by name."""
