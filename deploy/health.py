"""The images' health check: exit status 0 where the service in this container serves.

python health.py kvstore          # gRPC health, at the port and with the certificates of the service's settings
python health.py proxy /ready     # HTTP, the path given or /health
"""

import asyncio
import importlib
import ssl
import sys
import urllib.request
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omni_common.rpc import channel
from omni_common.rpc_errors import why

TIMEOUT_S = 5.0


async def serves(settings: Any) -> bool:
    """Whether the gRPC server answers SERVING. With TLS its certificate must name `localhost`."""
    async with channel(f"localhost:{settings.port}", tls=settings.tls) as connected:
        check = health_pb2_grpc.HealthStub(connected).Check
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            print(f"gRPC health: {error.code().name} {why(error)}")
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def answers(settings: Any, path: str) -> bool:
    """Whether the HTTP server answers 200. Its certificate is not verified: the question stays in this container."""
    context = ssl._create_unverified_context()
    scheme = "https" if settings.tls.cert_file else "http"
    try:
        with urllib.request.urlopen(
            f"{scheme}://127.0.0.1:{settings.port}{path}", timeout=TIMEOUT_S, context=context
        ) as response:
            return bool(response.status == 200)
    except OSError as error:
        print(f"HTTP {path}: {error}")
        return False


def main() -> None:
    service = sys.argv[1]
    settings = importlib.import_module(f"omni_{service}.settings").Settings.load()
    if service == "proxy":
        healthy = answers(settings, sys.argv[2] if len(sys.argv) > 2 else "/health")
    else:
        healthy = asyncio.run(serves(settings))
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
