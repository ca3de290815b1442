"""The session API's files: sessions that move, and vectors, as safetensors."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .. import transfer
from ..engine.errors import conflict, missing
from ..kv.snapshot import Snapshot
from ..kv.store import LostError
from . import schema
from .bridge import bridge_of
from .forms import info

_MOMENT = 0.005  # seconds between two looks at whether a cache has arrived

router = APIRouter(prefix="/v1", tags=["sessions"])
SAFETENSORS = "application/octet-stream"
# How a body that is such a file is described in the OpenAPI document.
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}, "description": "safetensors"}
}
BINARY_BODY = {
    "requestBody": {
        "required": True,
        "content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/sessions/{id}/export", responses=BINARY, response_model=None)
async def export(id: str, request: HttpRequest) -> Response:
    """The session, stopped or idle, as one safetensors file: to keep, or for `POST /v1/sessions/import` elsewhere."""
    bridge = bridge_of(request)

    def taken() -> tuple[dict[str, Any], dict[str, Any], Snapshot] | None:
        session = bridge.engine.session(id)
        # Of what is on its way back some lies here and some there.
        arriving = bridge.engine.memory.pager.arriving(session.cache)
        return None if arriving else transfer.export(bridge.engine, session)

    while (found := await bridge.do(taken)) is None:
        await asyncio.sleep(_MOMENT)
    tensors, metadata, snapshot = found
    try:
        file = await asyncio.to_thread(transfer.pack_session, tensors, metadata, snapshot)
    except LostError as error:
        raise conflict(f"session {id} cannot be exported: {error}") from error
    finally:
        await asyncio.shield(bridge.do(snapshot.release))
    return Response(file, media_type=SAFETENSORS)


@router.post("/sessions/import", response_model=schema.SessionInfo, status_code=201, openapi_extra=BINARY_BODY)
async def load(request: HttpRequest, id: schema.Name | None = None) -> dict[str, Any]:
    """A session out of a file that `export` made, of the same model; under another name if one is given."""
    bridge = bridge_of(request)
    file = await asyncio.to_thread(transfer.unpack, await request.body())

    def loaded() -> dict[str, Any]:
        return info(bridge.engine, transfer.load(bridge.engine, file, id))

    return await bridge.do(loaded)


@router.get("/vectors", response_model=schema.Vectors)
async def vectors(request: HttpRequest) -> dict[str, Any]:
    """Names of the vectors that edits can name."""
    engine = bridge_of(request).engine
    return {"vectors": sorted(engine.vectors), "features": engine.loaded.features}


@router.put("/vectors/{name}", response_model=schema.Done, openapi_extra=BINARY_BODY)
async def put_vector(name: str, request: HttpRequest) -> dict[str, Any]:
    """Store a vector, as a safetensors file with one tensor; one of that name is replaced."""
    bridge = bridge_of(request)
    tensor = transfer.one_tensor(await request.body(), "vector")
    await bridge.do(lambda: bridge.engine.store_vector(name, tensor))
    return {}


@router.get("/vectors/{name}", responses=BINARY, response_model=None)
async def get_vector(name: str, request: HttpRequest) -> Response:
    """A stored vector, as a safetensors file."""
    bridge = bridge_of(request)

    def read() -> bytes:
        if name not in bridge.engine.vectors:
            raise missing("vector", name)
        return transfer.pack({"vector": bridge.engine.vectors[name]}, {})

    return Response(await bridge.do(read), media_type=SAFETENSORS)


@router.delete("/vectors/{name}", response_model=schema.Done)
async def delete_vector(name: str, request: HttpRequest) -> dict[str, Any]:
    """Forget a vector; edits that use it keep it."""
    bridge = bridge_of(request)

    def removed() -> None:
        if bridge.engine.vectors.pop(name, None) is None:
            raise missing("vector", name)

    await bridge.do(removed)
    return {}
