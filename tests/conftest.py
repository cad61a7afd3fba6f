"""What holds for every test: two threads, fixed seeds, and nothing touches the user's home."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import properties  # noqa: F401  registers the profile of `make test-full`
from foveal.core import log

log.logger()  # its handler keeps the stream it finds: let that be pytest's, not one test's


@pytest.fixture(autouse=True, scope="session")
def two_threads_and_a_folder_of_our_own(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FOVEAL_LOG", raising=False)
        patch.setenv("COLUMNS", os.environ.get("COLUMNS", "100"))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone, and warnings that have not been given yet."""
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "cache"))
    log.warn_once.cache_clear()
    return tmp_path / "cache"
