"""A proxy in the simulation: the product's fleet, foresight, gate and policies, with messages instead of calls.

What `omni_proxy.lifecycle` awaits is a callback here; each step names the one it stands for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tracereplay.clock import Clock
from tracereplay.trace import BLOCK_TOKENS, Request, reusable

from fleetsim.constants import PREFILL
from fleetsim.gate import Gate
from fleetsim.knowledge import NO_OTHER_TIERS, Knowledge
from fleetsim.leg import Leg
from fleetsim.record import Guess, Served
from fleetsim.systems import System
from fleetsim.worker import Network, Worker
from omni_engine.ports import BlockEvent
from omni_proxy.fleet import Fleet
from omni_proxy.flow.ticket import Ticket
from omni_proxy.foresight import Computing, Foresight
from omni_proxy.ledger import Charge
from omni_proxy.room import least_work
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest, Slo
from omni_proxy.scheduling.times import WorkerTimes
from omni_proxy.sequence import OutputLengths
from omni_proxy.worker import Load, Member
from omni_proxy.worker import Worker as Known

MODEL, CONNECTOR = "m", "sim"
_NO_LIMIT = 1 << 30
_PATIENCE_S = 1e6
_FRESH_S = 0.001


class _Port:
    """Stands for a worker's client: always there."""

    ready = True


class _Keys:
    """Stands for `PromptKeys`: the block keys of one prompt."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys

    def of(self, prompt: Sequence[int], block_size: int, salt: str = "", adapter: str = "") -> bytes:
        return self._keys


@dataclass(slots=True)
class Run:
    """One request on its way. `keys` are those of the blocks that a cache can give."""

    number: int
    request: Request
    served: Served
    slo: Slo
    session: str
    keys: bytes
    foresight: Foresight
    output_tokens: int = 0
    is_fresh: bool = False
    """The fleet was looked at just now for this request."""
    decision: Decision | None = None


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
        self._clock, self._number, self._system = clock, number, system
        self._network, self._on_served = network, on_served
        self._workers = {worker.name: worker for worker in workers}
        self._names = list(self._workers)
        blocks = sum(worker.model.num_blocks for worker in workers)
        self._knowledge = Knowledge(2 * blocks, clock, positions, marks_s=2.0)
        self.fleet = Fleet(
            MODEL,
            self._knowledge,  # type: ignore[arg-type]
            NO_OTHER_TIERS,
            now=clock,
            times=lambda columns: WorkerTimes(columns, system.priors),
        )
        self._members = {worker.name: self._member(worker) for worker in workers}
        self._policy = system.policy()
        self._lengths = OutputLengths()
        self._gate = Gate(clock, self.fleet, system.flow) if system.flow is not None else None
        self.decision_s: list[float] = []

    def _member(self, worker: Worker) -> Member:
        model, port = worker.model, _Port()
        known = Known(
            id=worker.name,
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

    # What workers tell

    def loaded(self, worker: int, load: Load) -> None:
        # Steps are what the predictor learns from.
        self._members[self._names[worker]].load = load if self._system.learns else replace(load, steps=0)
        if load.others_prefills:
            # The rest of what stats say of load is in this proxy's ledger already.
            self._poke()

    def reported(self, worker: int, events: Sequence[BlockEvent]) -> None:
        self._knowledge.reported(self._names[worker], events)

    # The life of a request

    def arrive(self, number: int, request: Request, slo: Slo) -> None:
        """`SequenceRun._turn`"""
        run = self._run(number, request, slo)
        if self._gate is None:
            self._dispatch(run)
            return
        uncached, prefill_ms = least_work(run.foresight.view(run.output_tokens), request.input_tokens)
        ticket = Ticket(
            request_id=str(number),
            arrived_s=self._clock.now_s,
            deadline_s=self._clock.now_s + _PATIENCE_S,
            tenant=request.tenant,
            prompt_tokens=request.input_tokens,
            uncached_tokens=uncached,
            output_tokens=run.output_tokens,
            ttft_slo_ms=slo.ttft_ms,
            itl_slo_ms=slo.itl_ms,
            prefill_ms=prefill_ms,
        )
        self._gate.enter(ticket, lambda: self._dispatch(run))

    def _run(self, number: int, request: Request, slo: Slo) -> Run:
        """The prompt's second block tells its conversation: the first is often common to all."""
        keys = request.keys[: reusable(request)]
        unloaded_s = PREFILL.unloaded_s(request.input_tokens)
        joined = b"".join(keys)
        foresight = Foresight(
            range(request.input_tokens),
            _Keys(joined),  # type: ignore[arg-type]
            self.fleet,
            None,  # type: ignore[arg-type]
            self._clock,
        )
        return Run(
            number,
            request,
            Served(self._clock.now_s, request.input_tokens, request.output_tokens, unloaded_s, request.tenant),
            slo,
            keys[1].hex() if len(keys) > 1 else "",
            joined,
            foresight,
            self._lengths.expect(_NO_LIMIT),
        )

    def _dispatch(self, run: Run) -> None:
        """`SequenceRun._prefilled`, or decode alone: decide, and send the prompt to whoever computes it."""
        served, request = run.served, run.request
        served.hold_s = self._clock.now_s - served.arrived_s
        run.is_fresh = self._gate is not None and served.hold_s < _FRESH_S
        decision = run.decision = self._decide(run, self._wish(run), afresh=not run.is_fresh)
        served.disaggregated = decision.prefill is not None
        served.worker = decision.prefill or decision.decode
        worker = self._members[served.worker].worker
        output = 0 if served.disaggregated else run.output_tokens
        computing = run.foresight.compute_on(worker, output)
        computing.__enter__()
        self._knowledge.dispatched(served.worker, run.keys)
        leg = Leg(
            request.keys,
            request.input_tokens,
            1 if served.disaggregated else request.output_tokens,
            keeps_blocks=served.disaggregated,
            on_first=lambda leg: self._first_token(run, leg, computing),
            on_end=None if served.disaggregated else lambda leg: self._ended(run, leg, computing.charge),
        )
        self._send(served.worker, leg, run.foresight.uncached_tokens(worker))

    def _first_token(self, run: Run, leg: Leg, computing: Computing) -> None:
        """The answer of a prefill worker, or the first token of decode alone."""
        served, decision = run.served, run.decision
        assert decision is not None
        took_ms = (leg.first_s - leg.arrived_s) * 1e3
        served.ttft_s = self._clock.now_s - served.arrived_s
        served.cached_tokens = leg.cached
        served.queue_s = leg.scheduled_s - leg.arrived_s
        served.compute_s = leg.first_s - leg.scheduled_s
        if decision.prediction.computed_ms:
            served.prompt_guess = Guess(decision.prediction.computed_ms, took_ms)
        self._knowledge.computed(served.worker, run.keys)
        if self._system.learns:
            computing.computed(leg.cached, took_ms)
        else:
            computing.charge.computed()
        if served.disaggregated:
            computing.__exit__(None, None, None)
            if run.request.output_tokens > 1:
                self._hand_over(run, leg, decision)
            else:
                self._workers[served.worker].engine.release(leg)
                self._done(run)
        self._poke()

    def _hand_over(self, run: Run, prefilled: Leg, pair: Decision) -> None:
        """`SequenceRun._submitted`: to decode, which pulls the blocks."""
        holder, decision = pair.prefill, pair
        assert holder is not None
        if self._system.binds_late:
            # The blocks are where they are: what the caches hold is not looked up again.
            kind = self._members[holder].worker.kv_kind()
            wish = replace(self._wish(run, 1), may_prefill=False, kv_connector=kind, held_by=holder)
            decision = self._decide(run, wish, afresh=False)
        target, predicted = decision.decode, decision.prediction
        charge = self.fleet.ledger.charge(target, None, max(1, run.output_tokens - 1))
        charge.__enter__()
        if predicted.step_ms:
            run.served.step_guess = Guess(predicted.step_ms, 1.0)
        transfer_ms = predicted.transfer_ms or pair.prediction.transfer_ms

        def pulled(leg: Leg) -> None:
            self._workers[holder].engine.release(prefilled)
            self._clock.after(self._network.message_s, self._pulled, run, leg, (holder, target), transfer_ms)

        leg = Leg(
            run.request.keys,
            run.request.input_tokens,
            run.request.output_tokens,
            pulls=True,
            on_pulled=pulled,
            on_end=lambda leg: self._ended(run, leg, charge),
        )
        self._send(target, leg, 0)

    def _pulled(self, run: Run, leg: Leg, pair: tuple[str, str], predicted_ms: float) -> None:
        moved, seen_ms = leg.prompt_tokens - leg.cached, leg.transfer_s * 1e3
        run.served.transfer_s = leg.transfer_s
        if predicted_ms:
            run.served.transfer_guess = Guess(predicted_ms, seen_ms)
        if self._system.learns and moved:
            prefill, decode = map(self.fleet.columns.slot, pair)
            self.fleet.times.saw_transfer(prefill, decode, moved, seen_ms)

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
        predicted = run.decision.prediction.step_ms if run.decision is not None else 0.0
        if served.step_guess is not None:
            predicted = served.step_guess.predicted_ms
        has_gaps = predicted > 0 and decode_s > 0
        served.step_guess = Guess(predicted, decode_s * 1e3 / (leg.output_tokens - 1)) if has_gaps else None
        self._done(run)

    def _done(self, run: Run) -> None:
        run.served.ended_s = self._clock.now_s
        run.served.ends += 1
        self._lengths.saw(run.request.output_tokens)
        self._on_served(run.served)
        self._poke()

    # How

    def _wish(self, run: Run, generated: int = 0) -> SchedulingRequest:
        return SchedulingRequest(
            prompt_tokens=run.request.input_tokens + generated,
            output_tokens=max(1, run.output_tokens - generated),
            slo=run.slo,
            waited_ms=(self._clock.now_s - run.served.arrived_s) * 1e3,
            session=run.session,
        )

    def _decide(self, run: Run, request: SchedulingRequest, *, afresh: bool) -> Decision:
        """`SequenceRun._decide`"""
        began = time.perf_counter()
        generated = request.prompt_tokens - run.request.input_tokens
        view = run.foresight.view(request.output_tokens, generated, afresh=afresh)
        decision = self._policy.choose(request, view)
        self.decision_s.append(time.perf_counter() - began)
        return decision

    def _send(self, worker_id: str, leg: Leg, uncached_tokens: int) -> None:
        worker = self._workers[worker_id]
        self._clock.after(self._network.message_s, worker.take, leg, self._number, uncached_tokens)

    def _poke(self) -> None:
        if self._gate is not None:
            self._gate.poke()
