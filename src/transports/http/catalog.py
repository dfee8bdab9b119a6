"""Routes for the server's offers: profiles, channels, engine profiles, plugins."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from transports.http.answers import with_etag
from transports.http.caller import PROBLEMS, Api


def catalog_router(api: Api) -> APIRouter:
    """Return the routes of the catalog."""
    router = APIRouter(tags=["catalog"], responses=PROBLEMS)

    @router.get("/api/profiles")
    async def profiles(request: Request) -> Response:
        """Return the profiles that the caller may choose."""
        principal = await api.caller(request)
        return with_etag(request, {"profiles": api.doors.offers.profiles(principal)})

    @router.get("/api/channels")
    async def channels(request: Request) -> Response:
        """Return the channels that the caller may see."""
        principal = await api.caller(request)
        return with_etag(request, {"channels": api.doors.offers.channels(principal)})

    @router.get("/api/engine-profiles")
    async def engine_profiles(request: Request) -> Response:
        """Return the engine profiles, the default first; secret values are masked."""
        await api.caller(request)
        return with_etag(request, {"engineProfiles": api.doors.offers.engine_profiles()})

    @router.get("/api/plugins")
    async def plugins(request: Request) -> Response:
        """Return the loaded plugins. Where they come from, their errors and timings only with `debug` permission."""
        principal = await api.caller(request)
        return with_etag(request, {"plugins": api.doors.offers.plugins(principal)})

    return router
