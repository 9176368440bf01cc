"""The public names: the stub is the surface, imports are lazy, renamed names warn."""

import ast
import subprocess
import sys
from pathlib import Path

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
    assert imported(solve + "\nfs.sample, fs.Milstein", *extras, "torch._dynamo") == []  # the compiler: two seconds


def test_renamed_names_warn_still_work_and_are_deprecated_in_the_stub():
    stub = ast.parse(Path(fs.__file__).with_suffix(".pyi").read_text())
    classes = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes] == ["Denoising", "Tape"]
    for node in classes:
        (new,), (mark,) = (ast.unparse(base) for base in node.bases), map(ast.unparse, node.decorator_list)
        assert mark == f"typing_extensions.deprecated('Use {new}.')"
        assert node.name not in fs.__all__ + dir(fs)
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(fs, node.name) is getattr(fs, new)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="Milsten"):
        fs.Milsten  # noqa: B018
