"""An S3-compatible store on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyarrow import fs as pafs


@contextmanager
def bucket() -> Iterator[str]:
    """A root in a bucket, as a URI."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "none")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "none")
        address = f"{host}:{port}"
        pafs.S3FileSystem(endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True).create_dir(
            "bucket"
        )
        yield f"s3://bucket/root?endpoint_override={address}&scheme=http&region=us-east-1"
    server.stop()
