"""Expert placement over real processes on simulated engines: skewed load is evened out, and whatever dies on the way,
service and engines agree again afterwards."""

import contextlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from live import LiveStack, eventually, live_stack

from omni.engine.v1.worker_service_pb2 import DescribeRequest
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceStub
from omni.placement.v1 import placement_service_pb2 as pb
from omni.placement.v1.placement_service_pb2_grpc import PlacementServiceStub

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

GROUPS = ("prefill-0", "decode-0", "decode-1")
CLIENTS = 6
TIMEOUT_S = 60.0
RPC_TIMEOUT_S = 30.0
SKEWED, EVEN = 1.4, 1.3
# Rounds of 0.1 s, so that processes can be killed between two of them.
WORKER = {
    "LOAD_INTERVAL_S": "0.1",
    "SIM__EXPERTS__SKEW": "1.5",
    "SIM__EXPERTS__EXPERT_BYTES": str(100 * 2**20),
    "SIM__EXPERTS__COPY_GIB_PER_S": "1",
}
PLACEMENT = {
    "REBALANCE_INTERVAL_S": "0.2",
    "FORECAST__INTERVAL_S": "0.5",
    "FORECAST__MAX_AGE_S": "2",
    "ECONOMY__MIN_INTERVAL_S": "0",
    "ECONOMY__WAITS_OUT_BURSTS": "false",
}
ENVIRON = {f"OMNI_{role}_{name}": value for role in ("PREFILL", "DECODE") for name, value in WORKER.items()} | {
    f"OMNI_PLACEMENT_{name}": value for name, value in PLACEMENT.items()
}
FAILING = {"OMNI_PREFILL_SIM__FAULTS__FAIL_NEXT_MOVES": "1"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    home = tmp_path_factory.mktemp("placement")
    fleet = ("--engine", "sim", "--prefill", "1", "--decode", "2", "--expert-ranks", "4", "--spare-experts", "8")
    environ = ENVIRON | FAILING | {"OMNI_PROXY_POLICY": "least_uncached_tokens"}
    with live_stack(home, *fleet, environ=environ) as running:
        yield running


class Placement:
    """The service's own word, and that of the workers."""

    def __init__(self, stack: LiveStack) -> None:
        self._stack = stack

    @contextlib.contextmanager
    def _stub(self) -> Iterator[Any]:
        with grpc.insecure_channel(self._stack.processes()["placement"]["address"]) as channel:
            yield PlacementServiceStub(channel)

    def layout(self, part: str) -> pb.GetLayoutResponse:
        request = pb.GetLayoutRequest(model=self._stack.model, group=self._group(part))
        with self._stub() as stub:
            answer: pb.GetLayoutResponse = stub.GetLayout(request, timeout=RPC_TIMEOUT_S)
        return answer

    def imbalance(self, part: str, least: float, most: float = math.inf) -> float:
        """Slowest over mean rank as the ranks measured it in the newest window; 0 if it is not in the range."""
        request = pb.GetLoadRequest(model=self._stack.model, group=self._group(part))
        with self._stub() as stub, contextlib.suppress(grpc.RpcError):
            measured = float(stub.GetLoad(request, timeout=RPC_TIMEOUT_S).measured_imbalance)
            return measured if least <= measured < most else 0.0
        return 0.0

    def migrations(self, part: str, outcome: str) -> int:
        """Of which the worker says that they ended so."""
        port = self._stack.processes()[part]["metrics_port"]
        name = f'omni_worker_expert_migrations_total{{outcome="{outcome}"}} '
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
        return next((int(float(line.removeprefix(name))) for line in lines if line.startswith(name)), 0)

    def set_ranks(self, part: str, *excluded: int) -> pb.Layout:
        request = pb.SetRanksRequest(model=self._stack.model, group=self._group(part), excluded_ranks=excluded)
        with self._stub() as stub:
            layout: pb.Layout = stub.SetRanks(request, timeout=RPC_TIMEOUT_S).layout
        return layout

    def publish(self, part: str, solver: str) -> int:
        """A plan of this solver is put in force, once nothing else is under way; returns its version."""

        def published() -> int:
            request = pb.PlanRequest(model=self._stack.model, group=self._group(part), solver=solver, publish=True)
            with self._stub() as stub:
                try:
                    return int(stub.Plan(request, timeout=RPC_TIMEOUT_S).layout.layout_version)
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error  # a migration is under way
                    return 0

        version: int = eventually(f"a plan of {part} is published", published, TIMEOUT_S)
        return version

    def is_under_way(self, part: str) -> bool:
        """Some rounds are done and some are not."""
        status = self.layout(part).status
        return bool(status.migration_id) and 0 < status.rounds_done < status.num_rounds - 1

    def agrees(self, part: str, least_version: int = 1) -> bool:
        """The layout in force is applied, and the worker says so."""
        try:
            status = self.layout(part).status
            with grpc.insecure_channel(self._stack.processes()[part]["address"]) as channel:
                described = WorkerServiceStub(channel).Describe(DescribeRequest(), timeout=RPC_TIMEOUT_S)
        except grpc.RpcError:
            return False
        versions = {status.layout_version, status.applied_version, described.info.layout_version}
        return not status.migration_id and len(versions) == 1 and min(versions) >= least_version

    def _group(self, part: str) -> str:
        return f"{self._stack.name}-{part}"


@pytest.fixture
def placement(stack: LiveStack) -> Placement:
    return Placement(stack)


class Traffic:
    """Requests one after the other from several clients; `failed` holds what was not answered."""

    def __init__(self, stack: LiveStack) -> None:
        self._stack = stack
        self.stop = threading.Event()
        self.failed: list[str] = []
        self.answers = 0

    def run(self, client: int) -> None:
        number = client
        with self._stack.client() as connected:
            while not self.stop.is_set():
                number += CLIENTS
                self._ask(connected, number)

    def _ask(self, client: httpx.Client, number: int) -> None:
        prompt = f"Tale {number} of a fox and a hen. " * 12
        body = {"model": self._stack.model, "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length":
            self.answers += 1
        else:
            self.failed.append(answer.text)


@contextlib.contextmanager
def traffic(stack: LiveStack) -> Iterator[Traffic]:
    """Clients that run while the block does; afterwards every request must have been answered in full."""
    flow = Traffic(stack)
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(flow.run, client) for client in range(CLIENTS)]
        try:
            yield flow
        finally:
            flow.stop.set()
    for client in running:
        client.result()
    assert flow.failed == []


def test_a_rank_is_left_out_and_used_again(stack: LiveStack, placement: Placement) -> None:
    """Every expert of the last rank has a second copy while experts lie as engines start with them."""
    eventually("the group is known", lambda: placement.agrees("decode-1"), TIMEOUT_S)
    without = placement.set_ranks("decode-1", 3)
    shape = without.topology.num_layers, without.topology.num_ranks, without.topology.slots_per_rank
    physical = np.array(without.physical_to_logical).reshape(shape)
    assert (physical[:, 3] == -1).all() and (physical[:, :3] >= 0).any(axis=(0, 2)).all()
    eventually("it is done", lambda: placement.agrees("decode-1", without.layout_version), TIMEOUT_S)
    back = placement.set_ranks("decode-1")
    assert back.layout_version > without.layout_version
    eventually("the rank is used again", lambda: placement.agrees("decode-1", back.layout_version), TIMEOUT_S)


def test_skewed_load_is_reported_planned_applied_and_then_even(stack: LiveStack, placement: Placement) -> None:
    """Three groups at once, under traffic that must not notice. The first round of one fails and is tried again."""
    before = {part: placement.layout(part).layout.layout_version for part in GROUPS}
    skewed, even = dict.fromkeys(GROUPS, 0.0), dict[str, float]()

    def were_skewed() -> bool:
        skewed.update({part: max(skewed[part], placement.imbalance(part, SKEWED)) for part in GROUPS})
        return all(skewed.values())

    with traffic(stack) as flow:
        eventually("skewed load is reported", were_skewed, TIMEOUT_S)
        for part in GROUPS:
            eventually(f"{part} is rebalanced", lambda part=part: placement.agrees(part, before[part] + 1), TIMEOUT_S)
            is_even = partial(placement.imbalance, part, 1.0, EVEN)
            even[part] = eventually(f"{part} is even", is_even, TIMEOUT_S)
        answered = flow.answers
        eventually("answers go on", lambda: flow.answers > answered, TIMEOUT_S)
    outcomes = [placement.migrations("prefill-0", outcome) for outcome in ("failed", "applied")]
    assert outcomes[0] == 1 and outcomes[1] >= 1
    print("\nslowest over mean rank:", {part: f"{skewed[part]:.2f} -> {even[part]:.2f}" for part in GROUPS})


def test_the_service_dies_in_the_middle_of_a_migration(stack: LiveStack, placement: Placement) -> None:
    version = placement.publish("decode-0", "round_robin")
    eventually("the migration is under way", lambda: placement.is_under_way("decode-0"), TIMEOUT_S)
    victim = stack.kill("placement")
    eventually("placement is back", lambda: stack.pid("placement") != victim, TIMEOUT_S)
    for part in GROUPS:
        least = version if part == "decode-0" else 1
        eventually(f"{part} agrees", lambda part=part, least=least: placement.agrees(part, least), TIMEOUT_S)


def test_a_worker_dies_in_the_middle_of_a_migration(stack: LiveStack, placement: Placement) -> None:
    """It comes back with its experts in order and is brought to the layout in force."""
    version = placement.publish("decode-1", "round_robin")
    eventually("the migration is under way", lambda: placement.is_under_way("decode-1"), TIMEOUT_S)
    victim = stack.kill("decode-1")
    eventually("the worker is back", lambda: stack.pid("decode-1") != victim, TIMEOUT_S)
    eventually("it holds the layout in force", lambda: placement.agrees("decode-1", version), TIMEOUT_S)
    assert placement.layout("decode-1").layout.layout_version >= version
    with traffic(stack) as flow:
        eventually("it serves", lambda: flow.answers > 2 * CLIENTS, TIMEOUT_S)
