"""`python -m fewstep_analysis ...`, the same as `fewstep ...`; the commands are in `cli/`."""

from .cli.app import main

if __name__ == "__main__":
    main()
