"""The command line `fewstep`. Help and completion of options do not import torch."""

import sys


def main() -> None:
    """Run the command line, or say what to install where its libraries are missing."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.exit("fewstep: the command line needs the extra `analysis`; run: pip install 'fewstep[analysis]'")
    from .app import run

    run()
