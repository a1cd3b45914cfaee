"""Write: a plan's data and the page that shows it, as one HTML file.

``page.html`` is an ordinary page with a style sheet and a few scripts beside it, hand-written, without a library. Here
they are put where the page refers to them, and the data where it expects it: the file that comes out needs nothing
else, and its own policy lets it load nothing.
"""

import re
from pathlib import Path

_FOLDER = Path(__file__).parent
_PARTS = {
    r'<link rel="stylesheet" href="([\w.]+)">': "<style>\n{}</style>",
    r'<script src="([\w.]+)"></script>': "<script>\n{}</script>",
}
"""What the page refers to, and how it stands in the one file."""
_DATA = '<script type="application/json" id="plan">'


def html(data: str) -> str:
    """The page of a plan, from its JSON."""
    page = _read("page.html")
    for reference, inline in _PARTS.items():
        page = re.sub(reference, lambda found, inline=inline: inline.format(_read(found[1])), page)
    # Nothing within the data can end the element that holds it.
    return page.replace(_DATA, _DATA + data.replace("<", "\\u003c"))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
