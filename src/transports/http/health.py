"""`/healthz`: the process answers. `/readyz`: it can serve (store reachable, not draining)."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from transports.http.answers import json_response
from transports.http.caller import Api


def health_router(api: Api) -> APIRouter:
    """Return the routes for load balancers and supervisors. They ask for no credentials and tell no secrets.

    HEAD is answered as GET is, without the body: some balancers and uptime monitors ask so.
    """
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def liveness() -> Response:
        """Answer 200 as long as the process can answer at all."""
        return json_response({"status": "ok"})

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"description": "not ready; the body names the failed checks"}})
    async def readiness() -> Response:
        """Answer 200 when new clients can be served, else 503 with what is wrong by check.

        In both cases with `details` where there is something that an operator should see to.
        """
        wrong = await api.doors.readiness()
        remarks = api.doors.remarks()
        details = {"details": remarks} if remarks else {}
        if wrong:
            return json_response({"status": "not ready", "checks": wrong, **details}, 503, {"retry-after": "2"})
        return json_response({"status": "ready", **details})

    return router
