"""`python -m fewstep_analysis ...` is the command `fewstep ...`."""

from .cli import main

if __name__ == "__main__":
    main()
