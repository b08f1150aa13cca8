"The marker `cuda`, for tests that need an NVIDIA GPU: they are skipped where there is none. And the folder of the studies' scripts."
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "studies"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU; skipped where there is none")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
