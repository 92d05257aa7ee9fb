"""Servers for the tests of remote files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmkit.io import remote
from tests.helpers.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def object_server() -> Iterator[ObjectStore]:
    """An S3 server with a private bucket."""
    pytest.importorskip("moto.server")
    with object_store() as store:
        yield store


@pytest.fixture
def bucket(object_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The same server in the environment variables of s3fs; errors are retried at once."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    object_server.refuse = lambda method, path: None
    return object_server
