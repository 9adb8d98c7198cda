import pytest

from gradnorm_jax import cli


def test_a_data_set_of_ones_own_images(make_folder, tmp_path, capsys):
    prepare = ["data", "prepare", "mine", "--data-dir", str(tmp_path)]
    cli.main([*prepare, "--from", str(make_folder(3))])
    out, err = capsys.readouterr()
    assert out.startswith("prepared: tfds:mine")
    assert err == ""
    cli.main(prepare)
    assert "found: tfds:mine" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has a data set 'nothing'"):
        cli.main(["data", "prepare", "nothing", "--data-dir", str(tmp_path)])
