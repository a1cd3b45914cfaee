"""The page: a plan as one HTML file."""

from .write import html as html
