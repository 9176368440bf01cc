"""fewstep_analysis: measure solvers by orders of convergence and error against work.

The public names are those of `__init__.pyi`; each is imported when it is first used, which keeps the command line's
help free of torch.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
