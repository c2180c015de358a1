"""A process forked from a service, as engines are, has none of the service's gRPC threads."""

import subprocess
import sys
import textwrap

SERVICE = """
    import asyncio, os
    import omni_common.rpc as rpc

    async def main():
        server = rpc.Server([])
        port = await server.start("127.0.0.1:0")
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            if (child := os.fork()) == 0:
                os._exit(len(os.listdir("/proc/self/task")))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        await server.stop(0.0)

    asyncio.run(main())
"""


def test_a_fork_leaves_grpc_behind() -> None:
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(SERVICE)], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "1", ran.stderr[-2000:]
