"""Every test gets a cache folder of its own, and one thread: the machines that run them have two cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)
