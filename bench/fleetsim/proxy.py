"""A proxy in the simulation: the product's fleet, ledger, predictors and policies, with messages instead of calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetsim.clock import Clock
from fleetsim.constants import PREFILL
from fleetsim.engine import Leg
from fleetsim.gate import Gate
from fleetsim.knowledge import NO_OTHER_TIERS, Knowledge
from fleetsim.record import Guess, Served
from fleetsim.systems import System
from fleetsim.worker import Network, Worker
from omni_engine.ports import BlockEvent
from omni_proxy.fleet import Fleet, Load, Member, Role
from omni_proxy.fleet import Worker as Known
from omni_proxy.ledger import Charge
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.times import WorkerTimes, prompt_features
from tracereplay.trace import BLOCK_TOKENS, Request, reusable

MODEL = "m"
CONNECTOR = "sim"


class _Port:
    """Stands for a worker's client: always there."""

    ready = True


@dataclass(slots=True)
class Run:
    """One request on its way. `keys` are those of the blocks that a cache can give."""

    number: int
    request: Request
    served: Served
    slo: Slo
    session: str
    keys: bytes
    decision: Decision | None = None

    @property
    def arrived_s(self) -> float:
        return self.served.arrived_s

    @property
    def prompt_tokens(self) -> int:
        return self.request.input_tokens

    @property
    def ttft_slo_ms(self) -> float | None:
        return self.slo.ttft_ms


class Proxy:
    """`on_served` is called once for every request, when its last token came."""

    def __init__(
        self,
        clock: Clock,
        number: int,
        workers: Sequence[Worker],
        system: System,
        network: Network,
        positions: Mapping[bytes, int],
        on_served: Callable[[Served], None],
    ) -> None:
        self._clock, self._number, self._workers, self._system = clock, number, workers, system
        self._network, self._on_served = network, on_served
        blocks = sum(worker.model.num_blocks for worker in workers)
        self._knowledge = Knowledge(2 * blocks, clock, positions, marks_s=2.0)
        self.fleet = Fleet(
            MODEL,
            self._knowledge,  # type: ignore[arg-type]
            NO_OTHER_TIERS,
            now=clock,
            times=lambda columns: WorkerTimes(columns, system.priors),
        )
        self._names = [worker_name(worker) for worker in workers]
        self._by_name = dict(zip(self._names, workers, strict=True))
        self._members = [self._member(worker) for worker in workers]
        self._slots = [self.fleet.columns.slot(name) for name in self._names]
        self._policy = system.policy()
        self._gate: Gate[Run] | None = None
        if system.flow is not None:
            self._gate = Gate(clock, system.flow, self._room_in_ms, self._least_prefill, self.dispatch)
        self._lookahead_ms = system.flow.lookahead_ms if system.flow is not None else 0.0
        self.decision_s: list[float] = []

    def _member(self, worker: Worker) -> Member:
        model, port = worker.model, _Port()
        known = Known(
            id=worker_name(worker),
            address="",
            role=worker.role,
            epoch=1,
            model=MODEL,
            block_size=BLOCK_TOKENS,
            max_model_len=model.num_blocks * BLOCK_TOKENS,
            max_num_seqs=model.max_num_seqs,
            kv_connector=CONNECTOR,
            engine="sim",
            num_blocks=model.num_blocks,
            max_num_batched_tokens=model.max_num_batched_tokens,
        )
        member = Member(known, prefill=port, decode=port, is_reachable=True)  # type: ignore[arg-type]
        self.fleet.put(member)
        return member

    # ---- what workers tell

    def loaded(self, worker: int, load: Load) -> None:
        if self._system.learns:
            self._members[worker].load = load
        else:
            self._members[worker].load = replace(load, steps=0)
        if load.others_prefills:
            # The rest of what stats say of load is in this proxy's ledger already.
            self._poke()

    def reported(self, worker: int, events: Sequence[BlockEvent]) -> None:
        self._knowledge.reported(self._names[worker], events)

    # ---- the life of a request

    def arrive(self, run: Run) -> None:
        if self._gate is None:
            self.dispatch(run)
        else:
            self._gate.put(run)

    def dispatch(self, run: Run) -> None:
        """Decide, and send the prompt to whoever computes it."""
        served, now_s = run.served, self._clock.now_s
        served.hold_s = now_s - served.arrived_s
        decision = run.decision = self._decide(run, self._wish(run))
        served.disaggregated = decision.prefill is not None
        served.worker = decision.prefill or decision.decode
        worker = self._by_name[served.worker]
        slot = self.fleet.columns.slot(served.worker)
        uncached = decision.uncached_tokens
        cached = run.request.input_tokens - uncached
        ahead = self.fleet.times.work_ahead(slot, now_s)
        output = 0 if served.disaggregated else self._wish(run).output_tokens
        charge = self.fleet.ledger.charge(served.worker, (uncached, cached), output)
        charge.__enter__()
        self._knowledge.dispatched(served.worker, run.keys)

        def first(leg: Leg) -> None:
            self._first_token(run, leg, charge)
            own = prompt_features(leg.prompt_tokens - leg.cached, leg.cached)
            if self._system.learns:
                self.fleet.times.saw_prompt(slot, ahead + own, (leg.first_s - leg.arrived_s) * 1e3)
            self._poke()

        request = run.request
        if served.disaggregated:
            leg = Leg(request.keys, request.input_tokens, 1, keeps_blocks=True, on_first=first)
        else:
            leg = Leg(
                request.keys,
                request.input_tokens,
                request.output_tokens,
                on_first=first,
                on_end=lambda leg: self._ended(run, leg, charge),
            )
        self._send(worker, leg, uncached)

    def _first_token(self, run: Run, leg: Leg, charge: Charge) -> None:
        served, decision = run.served, run.decision
        assert decision is not None
        served.ttft_s = self._clock.now_s - served.arrived_s
        served.cached_tokens = leg.cached
        served.queue_s = leg.scheduled_s - leg.arrived_s
        served.compute_s = leg.first_s - leg.scheduled_s
        predicted = decision.prediction
        if predicted.ttft_ms:
            served.prompt_guess = Guess(predicted.ttft_ms, (leg.first_s - leg.arrived_s) * 1e3)
        self._knowledge.computed(served.worker, run.keys)
        charge.computed()
        if decision.prefill is None:
            return
        charge.__exit__(None, None, None)
        if run.request.output_tokens > 1:
            self._hand_over(run, leg, decision)
        else:
            self._workers[self._names.index(decision.prefill)].engine.release(leg)
            self._done(run)

    def _hand_over(self, run: Run, prefilled: Leg, decision: Decision) -> None:
        """To decode, which pulls the blocks."""
        holder = decision.prefill
        assert holder is not None
        if self._system.binds_late:
            request = replace(self._wish(run), may_prefill=False, kv_connector=CONNECTOR, held_by=holder)
            decision = self._decide(run, request)
        target = decision.decode
        charge = self.fleet.ledger.charge(target, None, self._wish(run).output_tokens)
        charge.__enter__()
        slots = self.fleet.columns.slot(holder), self.fleet.columns.slot(target)
        predicted_ms = decision.prediction.transfer_ms or run_prediction(run)

        def pulled(leg: Leg) -> None:
            self._by_name[holder].engine.release(prefilled)
            self._clock.after(self._network.message_s, self._pulled, run, leg, slots, predicted_ms)

        leg = Leg(
            run.request.keys,
            run.request.input_tokens,
            run.request.output_tokens,
            pulls=True,
            on_pulled=pulled,
            on_end=lambda leg: self._ended(run, leg, charge),
        )
        if decision.prediction.step_ms:
            run.served.step_guess = Guess(decision.prediction.step_ms, 1.0)
        self._send(self._by_name[target], leg, 0)

    def _pulled(self, run: Run, leg: Leg, slots: tuple[int, int], predicted_ms: float) -> None:
        moved, seen_ms = leg.prompt_tokens - leg.cached, leg.transfer_s * 1e3
        run.served.transfer_s = leg.transfer_s
        if predicted_ms:
            run.served.transfer_guess = Guess(predicted_ms, seen_ms)
        if self._system.learns:
            self.fleet.times.saw_transfer(*slots, moved, seen_ms)

    def _ended(self, run: Run, leg: Leg, charge: Charge) -> None:
        charge.__exit__(None, None, None)
        served = run.served
        decode_s = sum(count * gap for count, gap in leg.gaps)
        served.gaps = list(leg.gaps)
        if leg.pulls and served.gaps:
            # From the first token at the client to the second one there.
            begun_s = leg.ended_s - decode_s + self._network.message_s
            served.handoff_s = begun_s - (served.arrived_s + served.ttft_s)
            count, gap_s = served.gaps[0]
            served.gaps[:1] = [(1, gap_s + served.handoff_s), (count - 1, gap_s)]
        if served.step_guess is None and run.decision is not None and run.decision.prediction.step_ms:
            served.step_guess = Guess(run.decision.prediction.step_ms, 1.0)
        if served.step_guess is not None and leg.output_tokens > 1:
            mean_ms = decode_s / (leg.output_tokens - 1) * 1e3
            served.step_guess = Guess(served.step_guess.predicted_ms, mean_ms)
        else:
            served.step_guess = None
        self._done(run)

    def _done(self, run: Run) -> None:
        run.served.ended_s = self._clock.now_s
        run.served.ends += 1
        self._on_served(run.served)
        self._poke()

    # ---- how

    def _room_in_ms(self) -> float:
        slots, prefills, decodes = self.fleet.usable_slots()
        computing = slots[prefills] if prefills.any() else slots[decodes]
        backlog_ms = self.fleet.times.backlog_ms(computing, self._clock.now_s)
        return max(0.0, float(backlog_ms.min()) - self._lookahead_ms)

    def _least_prefill(self, run: Run) -> tuple[int, float]:
        view = self.fleet.view(self.fleet.forecast(lambda size: run.keys), run.prompt_tokens, 128)
        row = int(np.argmin(np.where(view.prefills, view.times.prefill_ms, np.inf)))
        return run.prompt_tokens - int(view.cached_tokens[row]), float(view.times.prefill_ms[row])

    def _wish(self, run: Run) -> SchedulingRequest:
        return SchedulingRequest(
            prompt_tokens=run.request.input_tokens,
            slo=run.slo,
            waited_ms=(self._clock.now_s - run.served.arrived_s) * 1e3,
            session=run.session,
        )

    def _decide(self, run: Run, request: SchedulingRequest) -> Decision:
        began = time.perf_counter()
        view = self.fleet.view(self.fleet.forecast(lambda size: run.keys), request.prompt_tokens, request.output_tokens)
        decision = self._policy.choose(request, view)
        self.decision_s.append(time.perf_counter() - began)
        return decision

    def _send(self, worker: Worker, leg: Leg, uncached_tokens: int) -> None:
        self._clock.after(self._network.message_s, worker.take, leg, self._number, uncached_tokens)

    def _poke(self) -> None:
        if self._gate is not None:
            self._gate.poke()


def worker_name(worker: Worker) -> str:
    return f"{'p' if worker.role is Role.PREFILL else 'd'}{worker.number}"


def run_prediction(run: Run) -> float:
    return run.decision.prediction.transfer_ms if run.decision is not None else 0.0


def run_of(number: int, request: Request, now_s: float, slo: Slo) -> Run:
    """A request that arrives now. Its second block tells its conversation: the first is often common to all."""
    keys = request.keys[: reusable(request)]
    served = Served(now_s, request.input_tokens, request.output_tokens, PREFILL.unloaded_s(request.input_tokens))
    session = keys[1].hex() if len(keys) > 1 else ""
    return Run(number, request, served, slo, session, b"".join(keys))
