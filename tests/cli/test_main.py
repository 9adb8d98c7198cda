import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax import cli
from gradnorm_jax.cli import commands
from gradnorm_jax.models import init_model, save_weights
from tests.evaluation.processes import evaluate_command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Good inputs, any of which a test can spoil."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("id", "ood"):
        (root / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "empty").mkdir()
    shutil.copytree(root / "ood", root / "broken")
    (root / "broken" / "1.png").write_text("text")
    save_weights(init_model("bit_tiny", 3, jax.random.key(0)).params, "bit_tiny", root / "w.npz")
    (root / "pickle.npz").write_bytes(b"\x80\x04K\x01.")
    (root / "used").mkdir()
    (root / "used" / "report.md").write_text("earlier results")
    return root


def arguments(root, **changes):
    options = {
        "model": "bit_tiny",
        "weights": root / "w.npz",
        "id": root / "id",
        "ood": f"far={root / 'ood'}",
        "detectors": "gradnorm",
        **changes,
    }
    return evaluate_command(options)


def test_evaluate_prints_the_table(inputs, tmp_path, capsys):
    cli.main(arguments(inputs, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "gradnorm" in printed
    assert "far" in printed
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "{root}/nowhere"}, "nowhere does not exist"),
        ({"ood": "far={root}/nowhere"}, "nowhere does not exist"),
        ({"fit": "{root}/nowhere"}, "nowhere does not exist"),
        ({"id": "{root}/empty"}, "empty holds no image"),
        ({"ood": "{root}/ood"}, "write NAME=PATH"),
        ({"ood": "ID={root}/ood"}, "'ID' is taken"),
        ({"ood": "a/b={root}/ood"}, "'a/b' cannot be that of a file"),
        ({"model": "resnet"}, "no architecture 'resnet'"),
        ({"model": "mobilenet_v2"}, "weights of bit_tiny and not of mobilenet_v2"),
        ({"weights": "{root}/nothing.npz"}, "nothing.npz"),
        ({"weights": "{root}/pickle.npz"}, "pickle.npz"),
        ({"detectors": "nonsense"}, "unknown detector 'nonsense': `gradnorm-jax detectors` lists"),
        ({"detectors": "mahalanobis"}, "none of the detectors can be run"),
        ({"detectors": "mahalanobis", "fit": "{root}/id"}, "labels outside of 0..2"),
        ({"temperature": "0"}, "temperature must be positive and finite, got 0"),
        ({"id": "tfds:mine", "data-dir": "{root}"}, "gradnorm-jax data prepare mine --data-dir /"),
        ({"batch-size": "0"}, "batch_size must be at least 1, got 0"),
        ({"workers": "0"}, "workers must be at least 1, got 0"),
        (
            {"process": "2/2"},
            "--process must be I/N, with I from 0 to N - 1, such as 0/4, got '2/2'",
        ),
        ({"process": "1"}, "--process must be I/N, with I from 0 to N - 1, such as 0/4, got '1'"),
        ({"process": "-1/2"}, "got '-1/2'"),
        ({"process": "0/2", "distributed": "auto"}, "--process and --distributed both say which"),
        ({"model": "nowhere:build"}, "there is no module 'nowhere' for 'nowhere:build'"),
        ({"model": "tests.evaluation.networks:no"}, "'tests.evaluation.networks:no' names nothing"),
        ({"detectors": "nowhere:it"}, "cannot import detector 'nowhere:it': ModuleNotFoundError"),
        ({"detectors": "gradnorm(include_bias=perhaps)"}, "include_bias"),
        ({"preprocess": "crop=3,mean=half"}, "must give both mean and std"),
        ({"preprocess": "nowhere:it"}, "there is no module 'nowhere' for 'nowhere:it'"),
        ({"out": "nonsense://bucket"}, "cannot write to 'nonsense://bucket': give a path or gs://"),
        ({"preprocess": "nonsense"}, "unknown preprocessing 'nonsense'"),
        ({"max-undecodable": "2"}, "max_undecodable is a fraction from 0 to 1, got 2"),
        ({"ood": "fit={root}/ood"}, "'fit' is taken"),
        ({"out": "{root}/used"}, "used already exists and is not empty"),
        ({"out": "{root}/used/report.md"}, "report.md already exists"),
    ],
)
def test_bad_input_ends_with_one_sentence(inputs, tmp_path, changes, message):
    changes = {"out": f"{tmp_path}/out"} | changes
    changes = {name: value.format(root=inputs) for name, value in changes.items()}
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments(inputs, **changes))
    sentence = str(ended.value.code)
    assert sentence.startswith("gradnorm-jax: ")
    assert message in sentence
    assert "\n" not in sentence
    # Nothing is in the way of another try.
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_run_stopped_by_bad_images_goes_on_if_more_are_allowed(inputs, tmp_path, capsys):
    changes = {"ood": f"far={inputs / 'broken'}", "out": tmp_path / "out"}
    with pytest.raises(SystemExit, match=r"more than 0 of the 3 images of far .* 1\.png"):
        cli.main(arguments(inputs, **changes, **{"max-undecodable": 0}))
    kept = tmp_path / "out" / "scores" / "ID.parquet" / "000000.parquet"
    written = kept.stat().st_mtime_ns
    cli.main(arguments(inputs, **changes, **{"max-undecodable": 0.5}))
    assert "far: 1 files were excluded: 1.png" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == written


def test_another_run_in_the_same_folder(inputs, tmp_path):
    cli.main(arguments(inputs, out=tmp_path))
    with pytest.raises(SystemExit, match=r"gradnorm.options.temperature is '1.0' there and '2.0'"):
        cli.main(arguments(inputs, out=tmp_path, temperature=2))


def test_all_data_sets_that_are_missing_are_named(inputs, tmp_path):
    sets = ["inaturalist_ood", "sun_ood", "places_ood", "dtd"]
    command = ["evaluate", "--model", "bit_s_r101x1", "--weights", str(inputs / "w.npz")]
    command += ["--id", "tfds:imagenet2012:validation", "--ood", *(f"tfds:{name}" for name in sets)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    for name in ("imagenet2012", *sets):
        assert f"gradnorm-jax data prepare {name} --data-dir {tmp_path}" in str(ended.value.code)


def test_without_a_network(inputs, tmp_path):
    command = ["evaluate", "--out", str(tmp_path), "--ood", f"far={inputs / 'ood'}"]
    with pytest.raises(SystemExit, match="--model and --id must be given, or --from-cache"):
        cli.main(command)


def test_the_installed_command(inputs, tmp_path):
    command = [sys.executable, "-c", "from gradnorm_jax.cli import main; main()"]
    result = subprocess.run(
        [*command, *arguments(inputs, out=tmp_path, model="resnet")], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "no architecture 'resnet'" in result.stderr


def test_errors_of_the_runtime_are_one_sentence(inputs, monkeypatch):
    for error, sentence in RUNTIME_ERRORS:

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(commands, "run_evaluate", fail)
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments(inputs, out="nowhere"))
        assert ended.value.code == f"gradnorm-jax: {sentence}"


RUNTIME_ERRORS = [
    (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 GB.\nA list"),
        "the devices are out of memory; give a smaller --batch-size: RESOURCE_EXHAUSTED: Out of "
        "memory, 9 GB.",
    ),
    (
        jax.errors.JaxRuntimeError("INTERNAL: it broke\nA stack"),
        "the devices or their runtime have failed: INTERNAL: it broke",
    ),
    (RuntimeError("the loader stopped"), "the loader stopped"),
]


def test_off_a_cluster_the_processes_must_be_numbered(inputs, tmp_path):
    with pytest.raises(SystemExit, match=r"neither srun, nor mpirun, .* --process I/N$"):
        cli.main(arguments(inputs, out=tmp_path, distributed="auto"))


def test_a_launcher_numbers_the_processes(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    cli.main(arguments(inputs, out=tmp_path, distributed="auto"))
    assert "process 1 of 2 has done its share" in capsys.readouterr().err
