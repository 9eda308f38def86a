import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # for evals; last, since ./pykvc has no compiled half


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M, fetched on the first use."""
    from pykvc.models import default_model
    return default_model()


@pytest.fixture(scope="session")
def stock() -> Path:
    """The program of tests/stock: llama.cpp without our hooks, its usage in stock.cpp."""
    path = Path(os.environ.get("PYKVC_STOCK", ".build/stock/stock")).resolve()
    if not path.is_file():
        pytest.fail(f"{path} does not exist: run `make test`, or `make .build/stock/stock` and set PYKVC_STOCK to it.")
    return path
