import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest

from gradnorm_jax import metrics
from gradnorm_jax.data.tfds_prepare import prepare_source
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.run import EvaluateOptions, run


@pytest.fixture(scope="module")
def options(make_folder, weights, tmp_path_factory):
    return EvaluateOptions(
        model="bit_tiny",
        weights=weights,
        id=str(make_folder(20, classes=3)),
        ood=(f"near={make_folder(9, seed=1)}", f"far={make_folder(11, seed=2)}"),
        fit=str(make_folder(24, classes=3, seed=3)),
        out=tmp_path_factory.mktemp("run") / "out",
        batch_size=8,
    )


@pytest.fixture(scope="module")
def evaluation(options):
    return run(options)


def test_all_of_the_papers_detectors_run(evaluation):
    assert list(evaluation.metrics) == ["msp", "odin", "mahalanobis", "energy", "gradnorm"]
    assert list(evaluation.metrics["gradnorm"]) == ["near", "far"]
    assert not evaluation.not_run


def test_figures_follow_from_the_scores_on_disk(evaluation, options):
    figures = json.loads((options.out / "metrics.json").read_text())
    tables = {
        name: pyarrow.parquet.read_table(options.out / "scores" / f"{name}.parquet")
        for name in ("ID", "near", "far")
    }
    assert figures["images"] == {"ID": 20, "near": 9, "far": 11}
    for detector in ("msp", "mahalanobis", "gradnorm"):
        aurocs = []
        for name in ("near", "far"):
            scores = [tables[key][detector].to_numpy() for key in ("ID", name)]
            cell = figures["metrics"][detector][name]
            aurocs.append(metrics.auroc(*scores))
            assert cell["auroc"]["value"] == aurocs[-1]
            assert cell["auroc"]["low"] <= aurocs[-1] <= cell["auroc"]["high"]
            assert cell["fpr_at_95_tpr_id_positive"]["value"] == metrics.fpr_at_tpr(*scores)
        np.testing.assert_allclose(figures["averages"][detector]["auroc"], np.mean(aurocs))
    predicted = tables["ID"]["prediction"].to_numpy() == tables["ID"]["label"].to_numpy()
    assert figures["accuracy"] == predicted.mean()


def test_the_run_says_what_made_it(evaluation, options):
    config = json.loads((options.out / "config.json").read_text())
    assert config["options"]["id"] == options.id
    assert config["options"]["preprocess"] == "bit32"
    assert set(config["versions"]) >= {"python", "jax", "flax", "gradnorm-jax"}
    assert len(config["weights_sha256"]) == 64


def test_the_report_holds_every_figure(evaluation, options):
    text = (options.out / "report.md").read_text()
    value = evaluation.metrics["gradnorm"]["near"].auroc.value
    assert f"{100 * value:.2f}" in text
    assert "| Detector | near | far | Average |" in text
    assert (options.out / "histograms.png").stat().st_size > 1000


def test_averages_hand_computed(evaluation):
    cells = evaluation.metrics["msp"]
    mean = (cells["near"].auroc.value + cells["far"].auroc.value) / 2
    assert report.averages(cells.values())["auroc"] == pytest.approx(mean)


def test_without_training_images_fitted_detectors_are_listed_as_not_run(options, tmp_path):
    without = dataclasses.replace(
        options, fit=None, out=tmp_path / "out", detectors=("mahalanobis", "msp")
    )
    evaluation = run(without)
    assert list(evaluation.metrics) == ["msp"]
    assert "--fit" in evaluation.not_run["mahalanobis"]
    assert "mahalanobis was not run" in (tmp_path / "out" / "report.md").read_text()


def test_equal_runs_write_equal_files(evaluation, options, tmp_path):
    again = dataclasses.replace(options, out=tmp_path / "out")
    run(again)
    files = sorted(x.relative_to(again.out) for x in again.out.rglob("*") if x.is_file())
    assert [str(x) for x in files] == [
        "config.json",
        "histograms.png",
        "metrics.json",
        "report.md",
        "scores/ID.parquet/00000-00000.parquet",
        "scores/far.parquet/00000-00000.parquet",
        "scores/fit.parquet/00000-00000.parquet",
        "scores/near.parquet/00000-00000.parquet",
        "statistics/fit-00000.safetensors",
    ]
    for name in files[1:]:
        assert (again.out / name).read_bytes() == (options.out / name).read_bytes(), name


def test_a_run_goes_on_wherever_its_data_are_and_however_its_parameters_are_split(
    options, tmp_path
):
    prepare_source(open_source(options.id), "mine", data_dir=tmp_path / "here")
    first = dataclasses.replace(
        options,
        id="tfds:mine",
        data_dir=tmp_path / "here",
        fit=None,
        detectors=("msp",),
        out=tmp_path / "out",
    )
    expected = run(first).tables["ID"]
    assert len(expected.ids) == 20
    (tmp_path / "here").rename(tmp_path / "there")
    for file in (first.out / "scores" / "ID.parquet").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"prepare mine --data-dir {tmp_path}/here"):
        run(first)
    table = run(
        dataclasses.replace(first, data_dir=str(tmp_path / "there"), devices_per_copy=8)
    ).tables["ID"]
    assert table.ids == expected.ids
    np.testing.assert_allclose(table.scores["msp"], expected.scores["msp"], rtol=1e-6)
    with pytest.raises(FileExistsError, match=r"options\.batch_size is 8 there and 16 now"):
        run(dataclasses.replace(first, data_dir=tmp_path / "there", batch_size=16))
