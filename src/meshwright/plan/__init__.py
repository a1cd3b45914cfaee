"""The plan: what a program will communicate, compute and keep in memory, read from its trace."""

from .plan import Plan as Plan
from .plan import plan as plan
