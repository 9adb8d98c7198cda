"""Models, preprocessings, detectors and data of the user's own, by name."""

import json
import sys
import textwrap

import numpy as np
import pytest

from gradnorm_jax import cli
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.evaluation.records import ID
from tests.evaluation.processes import evaluate_command

MODULE = """
    import functools
    import jax
    import jax.numpy as jnp
    import numpy as np
    import gradnorm_jax as gj
    from gradnorm_jax.data.preprocess import Preprocess, resize

    TINY = Preprocess("tiny", 4, functools.partial(resize, size=4), (0.5,) * 3, (0.5,) * 3)

    def apply(params, images):
        features = images.reshape(len(images), -1) @ params["body"]
        return features @ params["kernel"]

    def parameters(seed):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        return {"body": draw(48, 9), "kernel": draw(9, 3)}

    def build():
        return gj.from_apply(apply, parameters(0), jnp.zeros((1, 4, 4, 3)))

    def build_with_preprocess():
        return build(), TINY

    def build_with_named_preprocess():
        return build(), "squash=4,mean=half,std=half"

    def build_of_weights(path):
        assert path.name == "weights.txt", path
        return gj.from_apply(apply, parameters(int(path.read_text())), jnp.zeros((1, 4, 4, 3)))

    def build_if_given(path=None):
        return build() if path is None else build_of_weights(path)

    def build_in(dtype):
        def rounded(params, images):
            images = images.astype(dtype).astype(jnp.float32)
            return apply(params, images)
        return gj.from_apply(rounded, parameters(0), jnp.zeros((1, 4, 4, 3)))

    def build_with_options(*paths, **options):
        assert not paths and not options
        return build()

    def build_nothing():
        return "a model"

    def build_too_much():
        return build(), TINY, 3

    def build_wrongly():
        raise ValueError("no such layer")

    not_a_function = 3

    def my_detector(scale: float = 1.0):
        return gj.Detector("mine", "logits", negated, options={"scale": scale})

    def negated(state, model, batch, *, scale):
        return -scale * batch.outputs.logits.max(axis=-1)

    constant = gj.Detector("constant", "logits", lambda s, m, batch: batch.outputs.logits[:, 0])
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with the user's module."""
    (tmp_path / "users_module.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "weights.txt").write_text("7")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_module", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def sets(make_folder):
    return {"id": make_folder(9, classes=3), "far": make_folder(5, seed=1)}


def run(sets, model="build", **changes):
    options = {
        "out": "out",
        "model": model if ":" in model else f"users_module:{model}",
        "id": str(sets["id"]),
        "ood": ((f"far={sets['far']}",),),
        "detectors": (("msp", "gradnorm"),),
        "preprocess": "squash=4,mean=half,std=half",
        **changes,
    }
    return run_evaluate(EvaluateOptions(**options))


@pytest.fixture(scope="module")
def expected(sets, tmp_path_factory):
    """Scores of `build`, which other ways to the same model give as well."""
    root = tmp_path_factory.mktemp("expected")
    (root / "expected_module.py").write_text(textwrap.dedent(MODULE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        return run(sets, model="expected_module:build", out=root / "out").scores


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("build", {"preprocess": "users_module:TINY"}),
        ("build_with_preprocess", {"preprocess": None}),
        ("build_with_named_preprocess", {"preprocess": None}),
        ("build_if_given", {}),
        ("build_in", {}),
        ("build_with_options", {}),
    ],
)
def test_ways_to_one_model(sets, expected, model, options):
    scores = run(sets, model, **options).scores
    for key, values in expected.items():
        np.testing.assert_array_equal(scores[key], values)


def test_weights_and_dtype_are_handed_on(sets, expected, here):
    path = here / "weights.txt"
    results = [run(sets, m, weights=path, out=m) for m in ("build_of_weights", "build_if_given")]
    for result in results:
        assert not np.allclose(result.scores["msp", ID], expected["msp", ID])
    np.testing.assert_array_equal(*(result.scores["msp", ID] for result in results))
    narrow = run(sets, "build_in", dtype="bfloat16", out="narrow").scores["msp", ID]
    assert not np.array_equal(narrow, expected["msp", ID])
    np.testing.assert_allclose(narrow, expected["msp", ID], rtol=0.1)
    config = json.loads((here / "narrow" / "config.json").read_text())
    assert config["model"] == "users_module:build_in, bfloat16"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("build_of_weights", {}, "users_module:build_of_weights needs path: give --weights"),
        ("build", {"weights": "w"}, "build takes no weights: give it a parameter, or no --weights"),
        ("build", {"dtype": "bfloat16"}, "build takes no dtype: give it a parameter of that name"),
        (
            "build",
            {"preprocess": None},
            r"returns no Preprocess .*return \(model, preprocess\), or",
        ),
        ("build_nothing", {}, "build_nothing must return a Model .* got a str"),
        ("build_too_much", {}, "build_too_much must return a Model .* got a tuple"),
        ("build_wrongly", {}, "no such layer"),
        ("not_a_function", {}, "not_a_function must be a function that returns a Model, got 3"),
        ("nothing", {}, "'users_module:nothing' names nothing: users_module has no nothing"),
        ("build", {"preprocess": "users_module:build"}, "users_module:build must be a Preprocess"),
        ("build", {"detectors": (("users_module:build",),)}, "must return a Detector"),
        ("build", {"detectors": (("users_module:my_detector(size=1)",),)}, "no option 'size'"),
        ("build", {"detectors": (("users_module:constant(a=1)",),)}, "takes no options"),
    ],
)
def test_what_cannot_be_built(sets, here, model, options, message):
    with pytest.raises(ValueError, match=message):
        run(sets, model, **options)
    assert not (here / "out").exists()


def test_detectors_of_ones_own(sets):
    spec = "users_module:my_detector(scale=2.5)"
    result = run(sets, detectors=((spec, "users_module:my_detector", "users_module:constant"),))
    assert list(result.metrics) == [spec, "users_module:my_detector", "users_module:constant"]
    np.testing.assert_allclose(
        result.scores[spec, ID], 2.5 * result.scores["users_module:my_detector", ID], rtol=1e-6
    )


def test_flags_that_are_repeated_add_up(sets, make_folder, here):
    sets = {**sets, "b": make_folder(4, seed=2), "c": make_folder(6, seed=3)}
    options = {
        "model": "users_module:build_with_preprocess",
        "id": sets["id"],
        "out": "out",
    }
    cli.main(
        [
            *evaluate_command(options),
            *("--ood", f"far={sets['far']}"),
            *("--ood", f"b={sets['b']}", f"c={sets['c']}"),
            *("--detectors", "msp", "--detectors", "energy", "gradnorm"),
        ]
    )
    found = json.loads((here / "out" / "metrics.json").read_text())
    assert list(found["metrics"]) == ["msp", "energy", "gradnorm"]
    assert all(list(cells) == ["far", "b", "c"] for cells in found["metrics"].values())


def test_temperature_is_gradnorms_unless_it_says_otherwise(sets):
    specs = ("gradnorm", "gradnorm(temperature=1)", "energy")
    scores = run(sets, detectors=(specs,), temperature=4.0).scores
    plain = run(sets, detectors=(specs,), out="plain").scores
    assert not np.allclose(scores["gradnorm", ID], plain["gradnorm", ID])
    for spec in specs[1:]:
        np.testing.assert_array_equal(scores[spec, ID], plain[spec, ID])


def test_processes_and_cache(sets, expected, here, capsys):
    options = {
        "model": "users_module:build_with_preprocess",
        "id": sets["id"],
        "ood": f"far={sets['far']}",
        "out": "out",
        "cache": "float32",
        "batch-size": 1,
        "detectors": "msp",
    }
    for process in (1, 0):
        cli.main(evaluate_command({**options, "process": f"{process}/2"}))
        if process:
            assert "process 1 of 2 has done its share" in capsys.readouterr().err
    assert "Results: out" in capsys.readouterr().out
    again = ["evaluate", "--from-cache", "out", "--out", "again", "--detectors", "msp", "gradnorm"]
    cli.main(again)
    result = run_evaluate(
        EvaluateOptions(from_cache="out", out="again", detectors=(("msp", "gradnorm"),))
    )
    for key, values in expected.items():
        np.testing.assert_allclose(result.scores[key], values, rtol=1e-6)
    for name in ("model", "weights", "id", "ood", "fit", "cache"):
        with pytest.raises(
            SystemExit, match=f"--from-cache takes the place of --{name}: give only"
        ):
            cli.main([*again, f"--{name}", "float32"])
    with pytest.raises(SystemExit, match="holds no run with a cache; evaluate with one"):
        cli.main(["evaluate", "--from-cache", str(sets["far"]), "--out", "other"])
