"""The code in README and documentation is run as it stands there; command lines are parsed."""

import re
import shlex
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradnorm_jax as gj
from gradnorm_jax.cli.commands import parse
from gradnorm_jax.cli.evaluate import EvaluateOptions
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.models import get_architecture
from tests.documentation import code_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
TESTED_ELSEWHERE = {"reports.md", "serving.md", "training.md", "write_a_detector.md"}
FENCED = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
OWN_FILE = re.compile(r"\b(?:docs|experiments|gradnorm_jax|tests)/[\w/]+\.\w+")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(5)(nn.relu(x).mean(axis=(1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)).mean(axis=(1, 2)))


def function(params, images):
    return jnp.tanh(images.mean(axis=(1, 2)) @ params["body"]) @ params["head"]["kernel"]


@pytest.fixture(scope="module")
def names():
    """What the pages take for granted."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    many = rng.normal(size=(60, 8, 8, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    module = Linen()
    variables = module.init(keys[0], images, train=False)
    model = gj.from_linen(module, variables, images, train=False)
    data = {
        "train_images": many,
        "train_labels": np.arange(60) % 5,
        "test_images": many[:20],
        "test_labels": np.arange(20) % 5,
        "noise_images": 3 * many[20:],
        "flipped_batches": lambda: iter(np.split(many[:, ::-1], 4)),
    }
    return data | {
        "gj": gj,
        "jax": jax,
        "images": images,
        "module": module,
        "variables": variables,
        "model": model,
        "result": gj.evaluate(model, many[:20], {"noise": data["noise_images"]}),
        "nnx_module": Nnx(nnx.Rngs(0)),
        "function": function,
        "params": {
            "body": jax.random.normal(keys[0], (3, 8)),
            "head": {"kernel": jax.random.normal(keys[1], (8, 5))},
        },
    }


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in TESTED_ELSEWHERE and code_of(page)],
    ids=lambda page: page.stem,
)
def test_the_code_of_the_page_runs(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = dict(names)
    for block in code_of(page):
        exec(block, own)
        assert own["model"](names["images"]).logits.shape == (4, 5)
    if "scores" in own:
        assert own["scores"].shape == (4,)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_the_page_are_understood(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8")).replace("\\\n", "")
    for command in re.findall(r"^ {4}gradnorm-jax (.*)", text, re.MULTILINE):
        line = command.replace("...", "--id i --ood o=o --out runs")
        options = parse(shlex.split(line, comments=True)).command
        if isinstance(options, EvaluateOptions):
            if options.model and ":" not in options.model:
                assert get_architecture(options.model)
            known = [name for name in sum(options.detectors, ()) if "my_module" not in name]
            assert parse_detectors(known or ("msp",))


def test_checks_run_the_test_command_of_the_readme():
    (command,) = re.findall(r"Run the tests:\n\n    (.*)", PAGES[0].read_text(encoding="utf-8"))
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("--quiet ", "")
    assert command in lines.splitlines()


def anchors(page):
    """Of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *ROOT.glob("docs/*/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text("utf-8"))
    for path, anchor in LINK.findall(text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
    for path in OWN_FILE.findall(text):
        assert (ROOT / path).exists(), path
