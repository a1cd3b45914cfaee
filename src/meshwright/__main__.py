"""``python -m meshwright`` is ``mw``."""

import sys

from .cli import main

sys.exit(main())
