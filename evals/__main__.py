"""`python -m evals`. Python puts the checkout first on its path, where ./pykvc has no compiled half: it goes last."""
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != ROOT] + [ROOT]

try:
    import pykvc  # noqa: F401
    import pandas  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    print(f"evals cannot begin ({error}): run `pip install '.[evals]'` in the checkout first", file=sys.stderr)
    sys.exit(2)

from evals.cli import main  # noqa: E402

main()
