"""The command line `fewstep`. Help and completion of options do not import torch."""

import sys


def main() -> None:
    """Run the command line; if its dependencies are missing, print what to install."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        cure = "Run: pip install scipy matplotlib torchsde typer rich"
        print(f"fewstep: the command line cannot import {error.name}. {cure}", file=sys.stderr)
        raise SystemExit(2) from None
    from .app import run

    run()
