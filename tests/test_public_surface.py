"""The public names: the stub is the surface, imports are lazy, renamed names warn."""

import subprocess
import sys

import pytest

import fewstep as fs
import fewstep_analysis


def imported(code, *packages):
    """Which of the packages a fresh process has imported after running the code."""
    script = f"import sys\n{code}\nprint(*[m for m in {packages} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("package", [fs, fewstep_analysis], ids=lambda p: p.__name__)
def test_every_public_name_can_be_imported(package):
    assert len(package.__all__) > 5
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_heavy_packages_are_imported_only_when_used():
    assert imported("import fewstep, fewstep_analysis", "torch", "scipy", "matplotlib") == []
    assert imported("import fewstep_analysis.cli.app", "torch", "matplotlib") == []
    solve = "import fewstep as fs, torch\nfs.solve(fs.ODE(lambda t, y: -y), fs.RK4(), torch.ones(1), [0.0, 1.0])"
    extras = "torchsde", "matplotlib", "scipy", "sklearn", "diffusers", "typer", "rich"
    assert imported(solve, *extras) == []


def test_renamed_names_warn_and_still_work():
    with pytest.warns(DeprecationWarning, match="DiffusionModel"):
        assert fs.Denoising is fs.DiffusionModel


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="Milsten"):
        fs.Milsten  # noqa: B018
