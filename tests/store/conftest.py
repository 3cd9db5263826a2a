"""Marks the tests of this folder as those of buckets, and gives them a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from store.cloud_storage import CloudStorage, serving

from m3jax import store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.bucket)


@pytest.fixture
def quick_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudStorage]:
    """A server, which is asked again after milliseconds."""
    pauses = {"max_retries": 6, "initial_delay": "5ms", "max_delay": "20ms"}
    monkeypatch.setattr(store, "RETRIES", pauses)
    with serving() as server:
        yield server
