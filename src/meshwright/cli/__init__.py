"""The command line: a small file per command."""

from .main import main as main
