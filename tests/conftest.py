import os
import sys
from pathlib import Path

import pytest

from pykvc import _core

sys.path.append(str(Path(__file__).parent.parent))  # for evals; last, since ./pykvc has no compiled half

# PYKVC_TEST_NGL=99: the tests run on the device of this build (evals/tools/gpu_report.py)
if N_GPU_LAYERS := int(os.environ.get("PYKVC_TEST_NGL", "0")):
    class DeviceModel(_core.Model):
        def __init__(self, path, *, n_gpu_layers=0, **kwargs):
            super().__init__(path, n_gpu_layers=n_gpu_layers or N_GPU_LAYERS, **kwargs)

    _core.Model = DeviceModel


MODELS = {"model_path", "qwen_path", "gemma_path"}
SLOW_S = 5.0
_seconds: dict[str, float] = {}  # what each test of this run took


def pytest_collection_modifyitems(config, items):
    """Marks what fixtures tell, and what was slow when it ran last; `server` stands at most tests that it is true
    of."""
    slow = config.cache.get("pykvc/slow", {}) if hasattr(config, "cache") else {}
    for item in items:
        taken = set(item.fixturenames)
        marks = {"model": taken & (MODELS | {"stock"}), "network": "model_path" in taken, "server": "everyone" in taken,
                 "slow": item.nodeid in slow}
        for marker in filter(marks.get, marks):
            item.add_marker(marker)


def pytest_runtest_logreport(report):
    if report.when == "call":
        _seconds[report.nodeid] = round(report.duration, 1)


def pytest_sessionfinish(session):
    if hasattr(session.config, "cache"):  # not with -p no:cacheprovider
        known = {**session.config.cache.get("pykvc/slow", {}), **_seconds}
        session.config.cache.set("pykvc/slow", {name: seconds for name, seconds in known.items() if seconds > SLOW_S})


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M, fetched on the first use."""
    from pykvc.models import default_model
    return default_model()


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M."""
    return _large("qwen2.5-0.5b.gguf")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M, the base model, Q4_K_M."""
    return _large("gemma3-270m.gguf")


def _large(name: str) -> Path:
    """Too large to be fetched by each run of the tests: whoever has it puts it there."""
    from pykvc.models import models_dir
    path = models_dir()/name
    if not path.is_file():
        pytest.skip(f"{path} is not there: put the model at this path, or set PYKVC_MODELS to a folder that has it")
    return path


@pytest.fixture(scope="session")
def stock() -> Path:
    """The program of tests/stock: llama.cpp without our hooks, its usage in stock.cpp."""
    path = Path(os.environ.get("PYKVC_STOCK", ".build/stock/stock")).resolve()
    if not path.is_file():
        pytest.fail(f"{path} does not exist: run `make test`, or `make .build/stock/stock` and set PYKVC_STOCK to it.")
    return path
