"""The images of a sweep of jobs/generate.py, as its manifest lists them."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mmcore.errors import InputError
from mmcore.storage import Storage
from serve.errors import ApiError, bad_value, quoted
from serve.metrics import logger

# After so long the manifest is read again, as a sweep may grow or be made anew.
_REREAD_S = 30.0
_PLAN = "sweep.json"
MAX_PAGE = 200


@dataclass(frozen=True)
class _Row:
    image_id: str
    prompt: str
    seed: int
    key: str


class Gallery:
    def __init__(self, sweep: Storage) -> None:
        self._sweep = sweep
        self._rows: list[_Row] = []
        self._by_id: dict[str, _Row] = {}
        self._seen: tuple[bytes, list[str]] | None = None
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    def _read(self) -> None:
        from mmcore.data.manifest import MANIFEST, read_manifest

        try:
            plan = self._sweep.read(_PLAN)
        except FileNotFoundError:
            plan = b""
        # Sweeps of one size have parts of the same names. The plan tells them apart: it holds the run and the settings.
        seen = plan, (self._sweep / MANIFEST).list(".parquet")
        if seen == self._seen:
            return
        table, _ = read_manifest(self._sweep)
        columns = [table[name].to_pylist() for name in ("image_id", "prompt", "seed", "key")]
        self._rows = [_Row(*fields) for fields in zip(*columns, strict=True)]
        self._by_id = {row.image_id: row for row in self._rows}
        self._seen = seen

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() - self._read_at > _REREAD_S:
                try:
                    await asyncio.to_thread(self._read)
                except InputError as error:
                    # A client does not learn where the sweep lies.
                    logger.warning("no gallery", extra={"fields": {"error": str(error)}})
                    raise ApiError(404, "the gallery has no sweep of images", code="no_gallery") from None
                self._read_at = time.monotonic()

    async def page(self, limit: int, cursor: str | None) -> dict[str, Any]:
        """`limit` rows from `cursor` on. `cursor` is the `next` of the page before."""
        await self._refresh()
        start = 0
        if cursor is not None:
            if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
                raise bad_value("cursor", f"{quoted(cursor)}; give the `next` of the page before")
            start = int(cursor)
        rows = self._rows[start : start + limit]
        data = [
            {
                "image_id": row.image_id,
                "prompt": row.prompt,
                "seed": row.seed,
                "url": f"/v1/gallery/{quote(row.image_id)}",
            }
            for row in rows
        ]
        return {"data": data, "next": str(start + limit) if start + limit < len(self._rows) else None}

    async def image(self, image_id: str) -> bytes:
        """The PNG. Only files that the manifest names are read, so no part of a path comes from the caller."""
        await self._refresh()
        row = self._by_id.get(image_id)
        if row is None:
            raise ApiError(404, f"no image {quoted(image_id)} in the gallery", param="image_id", code="image_not_found")
        try:
            return await asyncio.to_thread(self._sweep.read, row.key)
        except FileNotFoundError:
            raise ApiError(404, f"the image {quoted(image_id)} is gone", code="image_not_found") from None
