"""Orders of the queue."""

import math
import random
from functools import partial

from omni_proxy.flow.orders import Order
from omni_proxy.flow.ticket import Ticket
from omni_proxy.scheduling.conformance.trials import SAMPLES, fail, guarded


def check_order(order: Order, seed: int = 0) -> None:
    """Raises AssertionError: what the order does wrong."""
    draw = random.Random(seed)
    lengths = set()
    for ticket in (_ticket(draw) for _ in range(SAMPLES)):
        key, again = (guarded(partial(order.key, ticket)) for _ in range(2))
        if not isinstance(key, tuple) or not all(isinstance(part, int | float) for part in key):
            fail(f"key() returned {key!r}, not a tuple of numbers")
        if any(math.isnan(part) for part in key):
            fail("key() holds NaN, which has no place among numbers")
        if key != again:
            fail(f"key() gave {key} and then {again} for one ticket; a key is fixed when the request comes")
        lengths.add(len(key))
        if order.hopeless_from_s is not None:
            instant = guarded(partial(order.hopeless_from_s, ticket))
            if not isinstance(instant, int | float) or math.isnan(instant):
                fail(f"hopeless_from_s() returned {instant!r}, not an instant")
    if len(lengths) > 1:
        fail(f"keys of {sorted(lengths)} numbers: those of one order have one length")


def _ticket(draw: random.Random) -> Ticket:
    arrived_s = draw.uniform(0, 1000)
    return Ticket(
        request_id=f"r{draw.randrange(100)}",
        arrived_s=arrived_s,
        deadline_s=draw.choice([math.inf, arrived_s + draw.uniform(0, 600)]),
        tenant=draw.choice(["", "a", "b"]),
        priority=draw.choice([-10, 0, 10]),
        prompt_tokens=draw.choice([0, 1, 100, 100_000]),
        uncached_tokens=draw.choice([0, 1, 100]),
        output_tokens=draw.choice([0, 1, 1000]),
        ttft_slo_ms=draw.choice([None, 0.0, 500.0]),
        prefill_ms=draw.choice([0.0, 10.0, 1e4]),
    )
