import os
import sys
from pathlib import Path

import pytest

from pykvc import _core

sys.path.append(str(Path(__file__).parent.parent))  # for evals; last, since ./pykvc has no compiled half

# PYKVC_TEST_NGL=99: the tests run on the device of this build (evals/gpu_report.py)
if N_GPU_LAYERS := int(os.environ.get("PYKVC_TEST_NGL", "0")):
    class DeviceModel(_core.Model):
        def __init__(self, path, *, n_gpu_layers=0, **kwargs):
            super().__init__(path, n_gpu_layers=n_gpu_layers or N_GPU_LAYERS, **kwargs)

    _core.Model = DeviceModel


def pytest_collection_modifyitems(items):
    """-m "not model": the tests that fetch nothing and need no second build."""
    for item in items:
        if {"model_path", "stock"} & set(item.fixturenames):
            item.add_marker("model")


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
