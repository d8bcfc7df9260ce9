"""The page at `/`: a prompt to try, and what the slots hold while it is answered."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from cla_export.layout import KVLayout, bits
from cla_export.serve.engine import Engine
from cla_export.serve.model import ServedModel
from cla_export.serve.pool import PoolSize
from cla_export.serve.schema import errors

_FOLDER = Path(__file__).parents[1] / "data" / "serve"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {  # nothing from elsewhere, and in nobody's frame
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(
    app: FastAPI, model: ServedModel, engine: Engine, layout: KVLayout, dtype: str, pool: PoolSize
) -> None:
    """The page's files, and /status, which it asks twice a second."""
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _file(_FOLDER / name, kind), include_in_schema=False)
    fixed = {
        "model": model.name,
        "about": layout.describe(),
        "backend": engine.executor.backend,
        "capacity": pool.capacity,
        "kv_owner": list(layout.kv_owner),
        "groups": [
            asdict(group)
            | {"bytes_per_token": 2 * group.kv_heads * group.head_dim * bits(dtype) // 8}
            for group in layout.groups
        ],
        "bytes_per_token": pool.bytes_per_token,
        "dense_bytes_per_token": pool.dense_bytes_per_token,
        "dense_slots": pool.dense_slots,
    }

    @app.get("/status", responses=errors())
    async def status() -> dict[str, Any]:
        """What is served, and what each slot holds now."""
        load = engine.load
        return fixed | {
            "clock": time.monotonic(),
            "state": engine.state.value,
            "running": load.prefilling + load.decoding,
            "waiting": load.waiting,
            "generated": engine.generated,
            "slots": [asdict(slot) for slot in engine.slots()],
        }


def _file(path: Path, kind: str) -> Any:  # noqa: ANN401
    content = path.read_bytes()

    async def send() -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
