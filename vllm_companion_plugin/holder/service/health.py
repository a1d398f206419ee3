"""gRPC's health checks: every service serves until the process begins to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.messages import HealthCheckRequest, HealthCheckResponse


class Health:
    """Answers `grpc.health.v1.Health` for the process (the empty name) and its services."""

    def __init__(self, *services: str) -> None:
        self._services = {"", *services}
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Say `NOT_SERVING` from now on, also to those who watch."""
        self._ending.set()

    async def Check(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:200]!r} here")
        return self._status(request.service)

    async def Watch(
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[HealthCheckResponse]:
        """The status now and when it changes, which is once: when we end."""
        yield self._status(request.service)
        await self._ending.wait()
        yield self._status(request.service)

    def _status(self, service: str) -> HealthCheckResponse:
        if service not in self._services:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        ending = self._ending.is_set()
        return HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING if ending else HealthCheckResponse.SERVING)
