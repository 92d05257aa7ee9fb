"""A local S3 server (moto) that can delay or refuse answers.

python tests/helpers/object_store.py --delay 0.02 bucket FILE...    # prints its address, then serves the files
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}


class ObjectStore:
    """Serves buckets at `address`; `requests` has method and path of each request.

    delay   seconds before each answer
    refuse  from method and path of a request to the status that it gets instead of an answer, or None
    """

    def __init__(self, delay: float = 0.0) -> None:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.delay, self.requests = delay, list[tuple[str, str]]()
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self._answer = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        path += "?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else ""
        self.requests.append((method, path))
        time.sleep(self.delay)
        if status := self.refuse(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} Refused", [("Content-Length", "0")])
            return [b""]
        return self._answer(environ, start)

    def client(self) -> Any:
        """Return a boto3 client."""
        return client_of(self.address)

    def objects(self) -> dict[str, bytes]:
        """Return all objects of the bucket `bucket`."""
        return bucket_of(self.address)

    def environment(self) -> dict[str, str]:
        """Return the environment variables with the server's address and credentials for s3fs."""
        return environment(self.address)


def client_of(address: str) -> Any:
    """Return a boto3 client for the server at an address."""
    import boto3

    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=address, **keys)


def bucket_of(address: str) -> dict[str, bytes]:
    """Return all objects of the bucket `bucket` of a server."""
    client = client_of(address)
    listed = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    return {item["Key"]: client.get_object(Bucket="bucket", Key=item["Key"])["Body"].read() for item in listed}


def empty_bucket(address: str) -> None:
    """Delete all objects of the bucket `bucket` of a server."""
    for name in bucket_of(address):
        client_of(address).delete_object(Bucket="bucket", Key=name)


def environment(address: str) -> dict[str, str]:
    """Return the environment variables with a server's address and credentials for s3fs."""
    return {"AWS_ENDPOINT_URL": address, **CREDENTIALS}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server with an empty bucket `bucket` in a thread."""
    store = ObjectStore()
    threading.Thread(target=store.server.serve_forever, args=(0.01,), daemon=True).start()
    store.client().create_bucket(Bucket="bucket")
    yield store
    store.server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("bucket")
    parser.add_argument("files", nargs="*", type=Path)
    asked = parser.parse_args()
    with object_store() as store:
        client = store.client()
        if asked.bucket != "bucket":
            client.create_bucket(Bucket=asked.bucket)
        for path in asked.files:
            client.put_object(Bucket=asked.bucket, Key=path.name, Body=path.read_bytes())
        store.delay = asked.delay
        print(store.address, flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
