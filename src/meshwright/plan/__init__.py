"""The plan: what a program will communicate, compute and keep in memory, read from its trace."""

from .calibrate import calibrate as calibrate
from .compiled import Compiled as Compiled
from .hardware import Hardware as Hardware
from .plan import Plan as Plan
from .plan import plan as plan
from .time import Times as Times
from .warnings import PlanWarning as PlanWarning
