"""The command line, imported as `fewstep_analysis.cli`.

It stands beside the package `fewstep`, not in it: importing anything of that package imports torch, which
takes seconds, and help, completion and a misspelt option should not wait for it. Torch is imported by the
commands that compute, when they run.
"""
