"""The public surface of fewstep_analysis."""

from . import datasets as datasets
from . import diffusion_problems as diffusion_problems
from . import problems as problems
from . import teachers as teachers
from .convergence import OrderEstimate as OrderEstimate
from .convergence import strong_order as strong_order
from .convergence import strong_orders as strong_orders
from .convergence import weak_order as weak_order
from .convergence import weak_orders as weak_orders
from .expectation import Expectation as Expectation
from .expectation import expectation as expectation
from .figures import order_figure as order_figure
from .records import Record as Record
from .work import work_precision as work_precision
