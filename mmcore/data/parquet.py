"""The Parquet files of a folder, by Storage, whose requests to S3 are tried again for longer than pyarrow's own."""

import io
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.storage import Storage

NUM_IO_THREADS = 16
"""Objects read or written at the same time: each costs a round trip to S3."""


def read_tables(folder: Storage, columns: list[str] | None = None) -> list[pa.Table]:
    """The table of each file in the order of their names; the files are small and read whole."""
    read = lambda name: pq.read_table(io.BytesIO(folder.read(name)), columns=columns)
    with ThreadPoolExecutor(NUM_IO_THREADS) as threads:
        return list(threads.map(read, folder.list(".parquet")))
