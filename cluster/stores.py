"""Whether an object store answers at all, asked once a process.

Without credentials or a network a store's library tries for a quarter of an hour, in native code that Ctrl-C does not reach.
"""

import threading
from contextlib import suppress
from functools import cache, lru_cache
from urllib.parse import urlsplit

from pyarrow import fs as pafs

PATIENCE = 20.0  # seconds


def open_store(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI, and the path inside it. Raises OSError when its store is silent."""
    store = urlsplit(uri)
    if store.scheme != "file" and not _answers(store.scheme, store.netloc, store.query):
        raise OSError(f"{store.scheme}://{store.netloc}: no answer in {PATIENCE:.0f} s; correct its credentials or the network")
    return _opened(uri)


@lru_cache(maxsize=128)  # places in use at a time: a client of S3 takes 27 ms to make, and keeps its connections
def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(uri)


@cache
def _answers(scheme: str, bucket: str, query: str) -> bool:
    """Whether anything comes back, a refusal too: a bucket that shows nothing may hold objects that can be read."""
    asking = threading.Thread(target=_ask, args=(f"{scheme}://{bucket}?{query}".rstrip("?"),), daemon=True)  # it may never end
    asking.start()
    asking.join(PATIENCE)
    return not asking.is_alive()


def _ask(uri: str) -> None:
    with suppress(Exception):  # whoever opens it gets the same
        system, path = pafs.FileSystem.from_uri(uri)
        system.get_file_info(path)
