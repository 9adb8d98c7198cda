import subprocess
import sys

HEAVY = {"flax", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "pyarrow", "grain"}


def test_import_is_light():
    code = f"import sys, gradnorm_jax; print({HEAVY!r} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_every_public_name_exists():
    code = "import gradnorm_jax as gj; [getattr(gj, name) for name in gj.__all__]; print('ok')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "ok"
