import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradnorm_jax as gj

HEAVY = {"flax", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "rich", "optax"}
OF_EXTRAS = [
    *(
        "PIL",
        "chex",
        "flatbuffers",
        "grain",
        "importlib_resources",
        "matplotlib",
        "pyarrow",
        "safetensors",
    ),
    *("safetensors", "sklearn", "tensorflow", "tensorflow_datasets", "tensorstore", "tyro"),
]

WITHOUT_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({OF_EXTRAS}))  # such an entry makes an import fail

import jax.numpy as jnp
import numpy as np
import gradnorm_jax as gj

rng = np.random.default_rng(0)
params = {{"w": rng.normal(size=(12, 3)).astype(np.float32)}}
model = gj.from_apply(lambda params, x: x.reshape(len(x), -1) @ params["w"], params,
                      jnp.zeros((1, 2, 2, 3)))
images = rng.normal(size=(20, 2, 2, 3)).astype(np.float32)
pixels = np.zeros((3, 2, 2, 3), np.uint8)


def evaluate(id_data=images, **options):
    return gj.evaluate(model, id_data, {{"noise": lambda: iter([images, images[:3]])}}, **options)
"""


def run(code):
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    heavy = HEAVY | {*OF_EXTRAS}
    assert run(f"import sys, gradnorm_jax; print({heavy!r} & set(sys.modules))") == "set()"


def test_every_public_name_exists():
    assert run("import gradnorm_jax as gj; print({n for n in dir(gj) if not getattr(gj, n)})") == (
        "set()"
    )
    assert dir(gj) == sorted(gj.__all__)


def test_type_checkers_find_every_public_name():
    tree = ast.parse(Path(gj.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    lazy = {name: f"gradnorm_jax.{module}" for name, module in gj._LAZY.items()}
    assert seen == lazy | dict.fromkeys(gj._SUBMODULES, "gradnorm_jax")
    assert {*seen, "__version__"} == {*gj.__all__}


def test_evaluation_in_memory_needs_no_extra():
    code = """
print(evaluate(fit=(images, np.arange(20) % 3)))
gj.fit("mahalanobis", model, (images, np.arange(20) % 3)).score(images)
"""
    table = run(WITHOUT_EXTRAS + code)
    assert "mahalanobis" in table
    assert "not run" not in table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("evaluate(out='out')", r"run folders need pyarrow.*gradnorm-jax\[data\]"),
        ("evaluate('.', preprocess='bit32')", r"image files need grain.*gradnorm-jax\[data\]"),
        ("evaluate(pixels, preprocess='bit32')", r"images .* need PIL.*gradnorm-jax\[data\]"),
        ("gj.evaluate_cache('out')", r"run folders need pyarrow.*gradnorm-jax\[data\]"),
        ("gj.plots.roc([1, 2], {'a': [1, 2]})", r"plots need matplotlib.*gradnorm-jax\[plots\]"),
        (
            "from gradnorm_jax.__main__ import main; main()",
            r"commands need tyro, which is not installed: pip install 'gradnorm-jax\[data\]'",
        ),
    ],
)
def test_what_needs_an_extra_names_it(call, message):
    code = f"""
try:
    {call}
except (ModuleNotFoundError, SystemExit) as error:
    print(error)
"""
    assert re.fullmatch(f"(gradnorm-jax: )?{message}'?", run(WITHOUT_EXTRAS + code))


def test_the_command_tells_its_version():
    result = subprocess.run(
        [sys.executable, "-m", "gradnorm_jax", "--version"], capture_output=True, text=True
    )
    assert result.stdout == f"gradnorm-jax {gj.__version__}\n"


ROOT = Path(__file__).parents[1]


def imported():
    """What the package imports of others, at any place, by full names."""
    names = set()
    for path in (ROOT / "gradnorm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {*sys.stdlib_module_names, "gradnorm_jax"}
    return {name for name in names if name.split(".")[0] not in own}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for lines in extras for line in lines)]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in asked}
    distributions = importlib.metadata.packages_distributions()
    modules = {name.split(".")[0] for name in imported()}
    assert {distributions.get(m, [m])[0].lower().replace("_", "-") for m in modules} <= declared


def test_nothing_private_is_imported():
    private = re.compile(r"(^|\.)_(?!_)")
    assert [name for name in imported() if private.search(name)] == []


def test_a_variable_names_the_folder_of_real_data(tmp_path):
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['TEST_DATA'])"
    found = subprocess.run(
        [sys.executable, "-c", code, ROOT / "tests" / "conftest.py"],
        env=os.environ | {"GRADNORM_JAX_TEST_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(tmp_path)
