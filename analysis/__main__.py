"""`python -m fewstep.analysis ...`, the same as `fewstep ...`; the commands are in `cli/`."""

from fewstep_cli.app import main

if __name__ == "__main__":
    main()
