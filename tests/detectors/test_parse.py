import math
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradnorm_jax import detectors
from gradnorm_jax.detectors import DETECTORS, Detector, parse_detectors


def options_of(spec):
    (detector,) = parse_detectors([spec])
    return dict(detector.options)


def test_names_are_the_specs():
    names = [d.name for d in parse_detectors(["gradnorm", " gradnorm( ord = 2 ) "])]
    assert names == ["gradnorm", "gradnorm(ord=2)"]


def test_defaults_yield_to_options():
    default = {"gradnorm": {"temperature": 0.0}}
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        parse_detectors(["gradnorm"], default)
    parse_detectors(["gradnorm(temperature=1)", "msp"], default)


def test_texts_and_detectors_mix():
    mine = Detector("mine", "logits", len)
    found = parse_detectors(["msp", mine, detectors.gradnorm(ord=2)])
    assert [d.name for d in found] == ["msp", "mine", "gradnorm(ord=2)"]
    assert found[1] is mine
    assert parse_detectors("msp") == parse_detectors(["msp"])
    with pytest.raises(ValueError, match=r"'gradnorm\(ord=2\)' is asked for more than once"):
        parse_detectors(["gradnorm(ord=2)", detectors.gradnorm(ord=2.0)])


@pytest.mark.parametrize("text", ["false", "False", "FALSE", "fAlse"])
def test_false_is_false(text):
    assert options_of(f"gradnorm(include_bias={text})")["include_bias"] is False
    assert parse_detectors([f"gradnorm(autodiff={text})"])[0].needs == "outputs"
    true = {"false": "true", "False": "True", "FALSE": "TRUE", "fAlse": "tRue"}[text]
    assert options_of(f"gradnorm(include_bias={true})")["include_bias"] is True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2.0),
        ("1e1", 10.0),
        ("inf", math.inf),
        ("+3", 3.0),
        ("0.5", 0.5),
        ("Infinity", math.inf),
    ],
)
def test_numbers(text, value):
    ord = options_of(f"gradnorm(ord={text})")["ord"]
    assert ord == value
    assert type(ord) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("head", "head"),
        ("block4/*", "block4/*"),
        ("*/kernel", "*/kernel"),
        ("'a b,c'", "a b,c"),
        ('"it\'s"', "it's"),
        ("1", "1"),
        ("[a, 'b c', */d]", ("a", "b c", "*/d")),
        ("(a, b,)", ("a", "b")),
        ("[a]", ("a",)),
    ],
)
def test_words_paths_and_lists(text, value):
    norms = options_of(f"gradnorm(select={text})")["norms"]
    assert dict(norms.options)["select"] == value


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nonsense"], "unknown detector 'nonsense': `gradnorm-jax detectors` lists"),
        (["msp(ord=2)"], "'msp' has no option 'ord'; it has: temperature"),
        (["mahalanobis(x=2)"], "has no option 'x'; it has: none"),
        (["gradnorm(temperature=0)"], "temperature must be positive"),
        (["gradnorm(ord=0.1)"], "ord must be at least 0.5"),
        (["gradnorm(temperature=hot)"], "option temperature of gradnorm takes a number, got hot"),
        (["gradnorm(temperature=true)"], "takes a number, got true"),
        (["gradnorm(temperature=[1])"], "takes a number, got ["),
        (["gradnorm(ord=1,ord=2)"], "option ord is given more than once"),
        (
            ["gradnorm(include_bias=no)"],
            "option include_bias of gradnorm takes true or false, got no",
        ),
        (["gradnorm(include_bias=2)"], "takes true or false, got 2"),
        (["gradnorm(include_bias='false')"], "takes true or false, got 'false'"),
        (["gradnorm(select=head, autodiff=True)"], "select chooses the parameters"),
        (["gradnorm(2)"], "write NAME or NAME"),
        (["gradnorm(ord=1, 2)"], "write NAME or NAME"),
        (["gradnorm("], "write NAME or NAME"),
        (["gradnorm)"], "write NAME or NAME"),
        (["gradnorm()x"], "write NAME or NAME"),
        (["gradnorm(ord='1)"], "write NAME or NAME"),
        (["gradnorm(ord={[]:1})"], "write NAME or NAME"),
        ([""], "write NAME or NAME"),
        (["-" * 5000], "cannot read detector '---"),
        (["gradnorm(ord=" + "-" * 5000 + "1)"], "takes a number, got ---"),
        (["gradnorm(ord=" + "9" * 400 + ")"], "takes a number, got 999"),
        (["gradnorm(ord=" + "9" * 5000 + ")"], "takes a number, got 999"),
        (["gradnorm(ord=1e999)"], "takes a number, got 1e999"),
        (["odin(epsilon=foo)"], "option epsilon of odin takes a number, got foo"),
        (["odin(epsilon=nan)"], "option epsilon of odin takes a number, got nan"),
        (["odin(epsilon=None)"], "option epsilon of odin takes a number, got None"),
        (["odin(epsilon=-inf)"], "epsilon must be finite and not negative, got -inf"),
        (["odin(epsilon=-0.1)"], "epsilon must be finite and not negative, got -0.1"),
        (["msp", "msp"], "'msp' is asked for more than once"),
        ([], "no detectors are asked for"),
        ([detectors.msp], "a function that builds one must be called"),
        ([3], "a detector is given by its name or as a Detector, got 3"),
    ],
)
def test_bad_specs(specs, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_detectors(specs)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def score(state, model, batch, **options):
    return batch.outputs.logits[:, 0]


def build(
    count: int = 1,
    *,
    sign: Literal["up", "down"] = "up",
    bank: pathlib.Path | None = None,
    edges: Sequence[float] = (),
    size: int | Literal["auto"] = "auto",
    untyped=None,
) -> Detector:
    options = {"count": count, "sign": sign, "bank": bank, "edges": edges, "size": size}
    return Detector("built", "logits", score, options={**options, "untyped": untyped})


def build_open(**options):
    return Detector("open", "logits", score, options=options)


def build_needing(*, sign: str) -> Detector:
    return Detector("needing", "logits", score, options={"sign": sign})


def build_badly() -> Detector:
    return Detector("bad")


@pytest.fixture
def my_module(monkeypatch):
    module = types.ModuleType("my_package.my_module")
    vars(module).update({name: globals()[name] for name in globals() if name.startswith("build")})
    module.ready = Detector("ready", "logits", score)
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.my_module", module)
    return "my_package.my_module"


def test_detectors_of_other_modules(my_module):
    (ready,) = parse_detectors([f"{my_module}:ready"])
    assert ready.name == f"{my_module}:ready"
    (built,) = parse_detectors([f"{my_module}:build(count=2, sign=down)"])
    assert built.name == f"{my_module}:build(count=2,sign=down)"
    assert dict(built.options)["count"] == 2


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sign=down", "sign", "down"),
        ("bank=a/b.npz", "bank", pathlib.Path("a/b.npz")),
        ("bank=None", "bank", None),
        ("edges=[1, 2.5]", "edges", (1.0, 2.5)),
        ("size=auto", "size", "auto"),
        ("size=3", "size", 3),
        ("untyped=3", "untyped", 3),
        ("untyped=0.5", "untyped", 0.5),
        ("untyped=true", "untyped", True),
        ("untyped=None", "untyped", None),
        ("untyped=word", "untyped", "word"),
        ("untyped=nan", "untyped", "nan"),
        ("untyped=[1, a]", "untyped", (1, "a")),
    ],
)
def test_annotations_say_what_a_text_means(text, name, value, my_module):
    found = options_of(f"{my_module}:build({text})")[name]
    assert found == value
    assert type(found) is type(value)


def test_options_without_a_signature(my_module):
    assert options_of(f"{my_module}:build_open(a=1, b=[x])") == {"a": 1, "b": ("x",)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("build(count=1.5)", "option count of my_package.my_module:build takes a whole number"),
        ("build(sign=left)", "takes 'up' or 'down', got left"),
        ("build(edges=[1, x])", "takes a list, each a number, got"),
        ("build(other=1)", "has no option 'other'; it has: count, sign"),
        ("build_needing", "needs its option sign"),
        ("build_badly", "cannot be built: "),
        ("ready(count=1)", "is a Detector and takes no options"),
        ("number", "must be a Detector or a function that returns one, got 3"),
        ("nothing", "cannot import detector 'my_package.my_module:nothing': AttributeError"),
    ],
)
def test_bad_calls_of_other_modules(call, message, my_module):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_detectors([f"{my_module}:{call}"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:x", "cannot import detector 'no_such_module:x': ModuleNotFoundError"),
        ("math:pi", "must be a Detector or a function that returns one, got 3.14"),
        ("os:getcwd", "'os:getcwd' must return a Detector, got '"),
        ("os.path:", "write NAME or NAME"),
        ("..os:getcwd", "write NAME or NAME"),
    ],
)
def test_what_is_no_detector(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_detectors([spec])


def test_groups_of_the_table():
    everything = parse_detectors(["all"])
    inner = parse_detectors(["all:inner"])
    needless = [n for n, row in DETECTORS.items() if not row.example]
    assert [d.name for d in (*everything, *inner)] == needless
    assert {d.needs for d in inner} == {"network"}
    assert "network" not in {d.needs for d in everything}
    gradient = [d.name for d in parse_detectors(["all:gradient", "gradnorm(ord=2)"])]
    assert gradient[0] == "gradnorm"
    assert gradient[-1] == "gradnorm(ord=2)"
    assert "msp" not in gradient
    with pytest.raises(ValueError, match="no detectors 'all:best': write all, or all: and output,"):
        parse_detectors(["all:best"])
    with pytest.raises(ValueError, match="'msp' is asked for more than once"):
        parse_detectors(["msp", "all:output"])


GOOD = [
    "msp",
    "odin(epsilon=0.1, temperature=10)",
    "gradnorm(select=['a b', */c], ord=inf)",
    "gradnorm(include_bias=true)",
]
pieces = st.one_of(
    st.sampled_from([*DETECTORS, "(", ")", "[", "]", "=", ",", "'", '"', "-", "1", "inf", "nan"]),
    st.sampled_from(
        ["ord", "select", "epsilon", "temperature", "true", "None", "{", "9" * 400, " "]
    ),
    # No colon: whatever stands before it would be imported.
    st.text(st.characters(exclude_characters=":"), max_size=5),
)


@st.composite
def mutated(draw):
    text = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(1, 3))):
        at, until = sorted(draw(st.integers(0, len(text))) for _ in range(2))
        text = text[:at] + draw(pieces) + text[until:]
    return text


@given(st.one_of(st.lists(pieces, max_size=12).map("".join), mutated()))
def test_any_text_gives_detectors_or_a_value_error(text):
    try:
        (detector,) = parse_detectors([text])
    except ValueError as error:
        assert str(error)  # noqa: PT017
    else:
        hash(detector)
        assert detector.name == "".join(text.split())
