"""The start of a request in pieces, so that it does not hold up the tokens of others for as long as it takes."""

import asyncio


async def give_way() -> None:
    """Let others go first: one pass of the event loop receives what has come for them, the next one sends it on."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
