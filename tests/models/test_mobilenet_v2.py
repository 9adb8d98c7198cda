import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.models import MODELS, load_model, mobilenet_v2, save_weights
from gradnorm_jax.models.checkpoint import to_params

WEIGHTS = "weights/mobilenet_v2_1.0_224.npz"

# Both made by experiments/goldens/mobilenet_v2.py.
FEATURES = [
    [1.9398600058903162, 0.07789433837914606, 1.9254851976841274, 0.13990594449544957],
    [1.892575952795715, 0.07138886813436425, 1.9829108519838896, 0.21201930994559215],
]
LOGITS = [
    [
        1.8941407212712642,
        -1.7507900799426064,
        1.46556492069892,
        -1.5077688582448945,
        -0.8765533638931893,
    ],
    [
        1.8531014991394705,
        -1.7725855529007661,
        1.4214940011945914,
        -1.5050453857189985,
        -0.8656103423387511,
    ],
]
PHOTOGRAPHS = {
    # file: label, first logits, first features
    "ILSVRC2012_val_00000347.JPEG": (
        472,
        [-0.3261653292462581, 1.8186355402950747, -0.7622382362806762, 0.17798126359245836],
        [0.5240209097822857, 3.8108513324721778, 0.7649329760772343, 0.0],
    ),
    "ILSVRC2012_val_00000361.JPEG": (
        300,
        [-0.2661560279966951, -1.174458189932199, -0.26902809095869945, -0.6066821862687137],
        [0.0, 0.10816483099248646, 0.0, 0.011085860433055717],
    ),
    "ILSVRC2012_val_00000556.JPEG": (
        625,
        [-0.9728045844285158, -0.7400656716794853, -1.1227762435607946, 1.4484445672935391],
        [0.7552665531000242, 0.0, 0.0, 0.0],
    ),
}


def centre_crop(path):
    with Image.open(path) as image:
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        crop = image.convert("RGB").crop((left, top, left + 224, top + 224))
    return np.asarray(crop, np.float32) / np.float32(127.5) - np.float32(1.0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.03)]
)
def test_equals_independent_implementation(formula, x64, dtype, tolerance):
    module = mobilenet_v2.MobileNetV2(5, dtype=jnp.dtype(dtype))
    images = jnp.asarray(formula.numbers((2, 45, 64, 3), seed=0))
    template = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide), template)
    weights = formula.mobilenet_weights(formula.mobilenet_shapes(5))
    params = to_params(weights, template, mobilenet_v2.layout)
    outputs = jax.jit(module.apply)({"params": params}, images)
    assert outputs.features.dtype == outputs.logits.dtype == wide
    np.testing.assert_allclose(outputs.features[:, :4], FEATURES, rtol=0, atol=tolerance)
    np.testing.assert_allclose(outputs.logits, LOGITS, rtol=0, atol=tolerance)


def test_keys_shapes_and_parameter_count_are_the_published_ones(formula):
    module = MODELS["mobilenet_v2"].build(1000)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    # Published: 3,504,872 trainable ones, with a scale and a shift for each of the 17,056 channels
    # that are batch normalised; folding leaves one bias instead.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 3_504_872 - 17_056
    assert sum(map(np.prod, formula.mobilenet_shapes(1000).values())) == 3_504_872 - 17_056


def test_real_weights_give_the_independent_implementations_numbers(shared_data):
    model = load_model("mobilenet_v2", shared_data / WEIGHTS)
    labels, logits, features = map(list, zip(*PHOTOGRAPHS.values(), strict=True))
    images = np.stack([centre_crop(shared_data / "imagenet/id_val" / file) for file in PHOTOGRAPHS])
    outputs = jax.jit(model.apply)(model.params, jnp.asarray(images))
    assert outputs.logits.shape == (3, 1001)
    np.testing.assert_allclose(outputs.logits[:, :4], logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.features[:, :4], features, rtol=0, atol=1e-4)
    offset = MODELS["mobilenet_v2"].label_offset
    assert (outputs.logits.argmax(axis=-1) - offset).tolist() == labels


def test_real_weights_survive_a_round_trip(shared_data, tmp_path):
    model = load_model("mobilenet_v2", shared_data / WEIGHTS)
    save_weights(model.params, "mobilenet_v2", tmp_path / "copy.npz")
    with np.load(shared_data / WEIGHTS) as original, np.load(tmp_path / "copy.npz") as copy:
        assert sorted(original) == sorted(copy)
        for key in original:
            np.testing.assert_array_equal(original[key], copy[key])
