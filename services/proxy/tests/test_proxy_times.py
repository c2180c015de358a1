"""What the predictors say of workers, beside workers that serve prompts in order and take a known time for each."""

import heapq
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from omni_proxy.ledger import Charge, Ledger
from omni_proxy.scheduling.columns import Columns
from omni_proxy.scheduling.times import Capacity, Priors, Seen, WorkerTimes, prompt_features

FAST = (20.0, 0.4, 0.01)
"""Milliseconds per prompt, per new token, per thousand pairs of new token and context: five times the prior."""
KIND = Capacity("gpu", "nixl", max_num_seqs=8, kv_tokens=10_000, max_batched_tokens=2048)
STRANGER = Capacity("other")


@dataclass(slots=True)
class Truth:
    """A worker that computes one prompt after the other."""

    ms: tuple[float, float, float] = FAST
    noise: float = 0.05
    free_s: float = 0.0


@dataclass(order=True)
class End:
    at_s: float
    number: int
    charge: Charge = field(compare=False)
    slot: int = field(compare=False)
    work: Any = field(compare=False)
    sent_s: float = field(compare=False)


class World:
    """Workers of the model above, one proxy's ledger and what it learns. Answers take no time to arrive."""

    def __init__(self, seed: int = 0) -> None:
        self.now_s = 0.0
        self.columns = Columns()
        self.ledger = Ledger(self.columns, lambda: self.now_s)
        self.times = WorkerTimes(self.columns)
        self.truths: dict[str, Truth] = {}
        self.draw = random.Random(seed)
        self._ends: list[End] = []
        self._numbers = itertools.count()

    def join(self, name: str, truth: Truth | None = None, capacity: Capacity = KIND) -> None:
        """Its next epoch, if it is there already."""
        self.truths[name] = truth or Truth()
        self.times.join(self.columns.slot(name), capacity)

    def free_in_ms(self, name: str) -> float:
        return float(self.times.free_in_ms(np.array([self.columns.slot(name)]), self.now_s)[0])

    def drop(self, name: str) -> None:
        del self.truths[name]
        self.times.leave(self.columns.slot(name))
        self.ledger.forget(name)

    def backlog_ms(self, name: str) -> float:
        return float(self.times.backlog_ms(np.array([self.columns.slot(name)]), self.now_s)[0])

    def left_ms(self, name: str) -> float:
        """What the backlog truly is."""
        return max(0.0, self.truths[name].free_s - self.now_s) * 1e3

    def prefill_ms(self, name: str, new: int, cached: int = 0) -> float:
        slots, uncached = np.array([self.columns.slot(name)]), np.array([new])
        return float(self.times.of(slots, self.now_s, new + cached, 1, uncached).prefill_ms[0])

    def send(self, name: str, new: int, cached: int = 0) -> Charge:
        """As a leg does it: what is ahead is noted before the prompt itself is charged."""
        slot, truth = self.columns.slot(name), self.truths[name]
        features = prompt_features(new, cached)
        work = self.times.work_ahead(slot, self.now_s)[0] + features
        charge = self.ledger.charge(name, (new, cached))
        charge.__enter__()
        takes_ms = float(np.dot(truth.ms, features)) * max(0.1, self.draw.gauss(1.0, truth.noise))
        truth.free_s = max(truth.free_s, self.now_s) + takes_ms / 1e3
        heapq.heappush(self._ends, End(truth.free_s, next(self._numbers), charge, slot, work, self.now_s))
        return charge

    def until(self, at_s: float) -> None:
        """Answers that come until then are learned from."""
        while self._ends and self._ends[0].at_s <= at_s:
            end = heapq.heappop(self._ends)
            self.now_s = end.at_s
            end.charge.computed()
            end.charge.__exit__(None, None, None)
            self.times.saw_prompt(end.slot, end.work, (end.at_s - end.sent_s) * 1e3)
        self.now_s = at_s

    def drain(self) -> None:
        self.until(max((end.at_s for end in self._ends), default=self.now_s))

    def arrivals(self, name: str, count: int, load: float = 0.8) -> Iterator[tuple[float, float]]:
        """Random prompts at a share of what the worker can do: at each, the backlog as predicted and as it is."""
        mean_ms = float(np.dot(self.truths[name].ms, prompt_features(2000, 500)))
        for _ in range(count):
            self.until(self.now_s + self.draw.expovariate(load / mean_ms) / 1e3)
            yield self.backlog_ms(name), self.left_ms(name)
            self.send(name, self.draw.randrange(100, 4000), self.draw.choice((0, 0, 1000)))


def median_error(pairs: list[tuple[float, float]], least_ms: float = 100.0) -> float:
    """Relative, of backlogs that matter."""
    errors = sorted(abs(said - true) / true for said, true in pairs if true > least_ms)
    assert len(errors) > 20, "the worker was hardly ever busy: the figure says nothing"
    return errors[len(errors) // 2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("load", [0.5, 0.9, 1.3])
def test_the_predicted_backlog_is_what_is_left(seed: int, load: float) -> None:
    world = World(seed)
    world.join("w")
    pairs = list(world.arrivals("w", 300, load))
    assert median_error(pairs[100:]) < 0.1
    world.drain()
    assert world.backlog_ms("w") == 0


def test_a_backlog_melts_as_time_passes_and_what_is_late_stays() -> None:
    world = World()
    world.join("w")
    with world.ledger.charge("w", (4000, 0)), world.ledger.charge("w", (4000, 0)):
        whole = world.backlog_ms("w")
        assert whole == pytest.approx(2 * world.prefill_ms("w", 4000))
        world.now_s = whole / 2e3
        assert world.backlog_ms("w") == pytest.approx(whole / 2)
        world.now_s = whole / 1e3
        assert world.backlog_ms("w") == pytest.approx(whole / 10)
        # As late as it is already, it may be again.
        world.now_s = 3 * whole / 1e3
        assert world.backlog_ms("w") == pytest.approx(2 * whole)
    assert world.backlog_ms("w") == 0


@pytest.mark.parametrize("is_first", [False, True])
def test_a_prompt_that_is_given_up_takes_nothing_of_the_others_time(is_first: bool) -> None:
    world = World()
    world.join("w", Truth(noise=0.0))
    list(world.arrivals("w", 100))
    world.drain()
    prompts = [world.send("w", new) for new in ((100, 8000) if is_first else (8000, 100))]
    backlog_ms = world.backlog_ms("w")
    given_up = prompts[0] if is_first else prompts[1]
    world.now_s += 1.0
    given_up.__exit__(None, None, None)
    whole_ms = world.prefill_ms("w", 8000)
    passed_ms = 0.0 if is_first else 1000.0
    assert world.backlog_ms("w") == pytest.approx(whole_ms - passed_ms, rel=0.05)
    assert backlog_ms > whole_ms


def test_the_next_prompt_begins_when_the_first_is_answered() -> None:
    world = World()
    world.join("w")
    first, second = world.ledger.charge("w", (1000, 0)), world.ledger.charge("w", (3000, 0))
    with first, second:
        world.now_s = 5.0
        first.computed()
        assert world.backlog_ms("w") == pytest.approx(world.prefill_ms("w", 3000))
        world.now_s += world.prefill_ms("w", 3000) / 2e3
        assert world.backlog_ms("w") == pytest.approx(world.prefill_ms("w", 3000) / 2)


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_restarted_worker_is_learned_anew(factor: float) -> None:
    world = World(1)
    world.join("w")
    list(world.arrivals("w", 150))
    world.drain()
    before = world.prefill_ms("w", 2000)
    world.join("w", Truth((factor * FAST[0], factor * FAST[1], factor * FAST[2])))
    # Until something is seen the earlier epoch is the best guess.
    assert world.prefill_ms("w", 2000) == pytest.approx(before)
    pairs = list(world.arrivals("w", 250))
    assert median_error(pairs[50:], 100 * factor) < 0.1


def test_workers_of_one_kind_may_differ() -> None:
    world = World(2)
    world.join("fast")
    world.join("slow", Truth((60.0, 1.2, 0.03)))
    for name in ("fast", "slow"):
        assert median_error(list(world.arrivals(name, 200))[80:]) < 0.1
    assert world.prefill_ms("slow", 2000) == pytest.approx(3 * world.prefill_ms("fast", 2000), rel=0.1)


def test_a_newcomer_is_taken_to_be_like_the_others_of_its_kind() -> None:
    world = World(3)
    for name in ("a", "b"):
        world.join(name)
        list(world.arrivals(name, 100))
        world.drain()
    world.join("new")
    world.join("stranger", capacity=STRANGER)
    assert world.prefill_ms("new", 2000) == pytest.approx(world.prefill_ms("a", 2000), rel=0.1)
    slot = world.columns.slot("new")
    assert world.times.of(np.array([slot]), world.now_s, 2000, 1, np.array([2000])).confidence[0] == 0
    assert world.prefill_ms("stranger", 2000) == pytest.approx(np.dot(Priors().prompt, prompt_features(2000, 0)))


@pytest.mark.parametrize("lasted_ms", [3_000.0, 30_000.0])
def test_a_newcomers_first_prompt_is_not_taken_at_its_word(lasted_ms: float) -> None:
    """It may have met a compiler or a pause; believed, it would keep all others away."""
    world = World(3)
    world.join("old")
    list(world.arrivals("old", 100))
    world.drain()
    world.join("new")
    world.times.saw_prompt(world.columns.slot("new"), prompt_features(500, 0), lasted_ms)
    usual_ms = world.prefill_ms("old", 1000)
    assert world.prefill_ms("new", 1000) < 5 * usual_ms
    for _ in range(3):
        world.send("new", 1000)
        world.drain()
    assert world.prefill_ms("new", 1000) < 1.5 * usual_ms


@pytest.mark.parametrize("factor", [10.0, 1.8])
def test_an_idle_worker_that_was_far_slower_than_its_kind_gets_another_chance(factor: float) -> None:
    world = World(3)
    for name in ("slow", "b", "c"):
        world.join(name, Truth(tuple(factor * part for part in FAST)) if name == "slow" else None)  # type: ignore[arg-type]
        list(world.arrivals(name, 60))
        world.drain()
    slot, believed_ms, usual_ms = (
        world.columns.slot("slow"),
        world.prefill_ms("slow", 1000),
        world.prefill_ms("b", 1000),
    )
    for tenth in range(300):
        world.times.saw_idle(slot, world.now_s + tenth / 10)
    doubted_ms = world.prefill_ms("slow", 1000)
    assert doubted_ms == pytest.approx(believed_ms if factor < 2 else 2 * usual_ms, rel=0.2)
    for _ in range(4):
        world.send("slow", 1000)
        world.drain()
    assert world.prefill_ms("slow", 1000) == pytest.approx(factor * usual_ms, rel=0.3)


def test_who_came_together_hears_of_the_first_that_is_seen() -> None:
    world = World(4)
    world.join("seen")
    world.join("unseen")
    world.join("stranger", capacity=STRANGER)
    prior = world.prefill_ms("unseen", 2000)
    list(world.arrivals("seen", 40))
    world.drain()
    assert world.prefill_ms("unseen", 2000) > 2 * prior
    assert world.prefill_ms("unseen", 2000) == pytest.approx(world.prefill_ms("seen", 2000), rel=0.25)
    assert world.prefill_ms("stranger", 2000) == prior


def test_a_worker_that_has_not_decoded_is_taken_to_step_like_the_first_that_has() -> None:
    """With steps believed slower than they are it would get no sequence, and never show what it can."""
    world = World(4)
    for name in ("used", "unused", "stranger"):
        world.join(name, capacity=STRANGER if name == "stranger" else KIND)
    slots = {name: world.columns.slot(name) for name in ("used", "unused", "stranger")}

    def step_ms(name: str) -> float:
        return float(world.times.of(np.array([slots[name]]), 0.0, 100, 1, np.array([0])).step_ms[0])

    believed = step_ms("stranger")
    for batch in range(1, 41):
        world.times.saw_steps(slots["used"], batch, 100.0 * batch, 0.0, 5.0 + 0.1 * batch)
    assert step_ms("used") == pytest.approx(5.1, rel=0.1)
    assert step_ms("unused") == pytest.approx(step_ms("used"), rel=0.1)
    assert step_ms("stranger") == pytest.approx(believed)


def test_a_restarted_worker_keeps_what_it_knows_of_itself() -> None:
    world = World(5)
    world.join("fast")
    world.join("slow", Truth((60.0, 1.2, 0.03)))
    list(world.arrivals("slow", 100))
    world.drain()
    world.join("slow", world.truths["slow"])
    before = world.prefill_ms("slow", 2000)
    list(world.arrivals("fast", 150))
    world.drain()
    assert world.prefill_ms("slow", 2000) == before > 2 * world.prefill_ms("fast", 2000)


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_work_of_others_counts_as_prompts_like_one_another(prompts: int) -> None:
    world = World()
    world.join("w")
    slot = world.columns.slot("w")
    world.columns.others_prefills[slot], world.columns.others_uncached_tokens[slot] = prompts, 3000
    assert world.backlog_ms("w") == pytest.approx(prompts * world.prefill_ms("w", 3000 // prompts))
    ahead, _ = world.times.work_ahead(slot, 0.0)
    with world.ledger.charge("w", (500, 100)):
        assert world.times.work_ahead(slot, 0.0)[0] == pytest.approx(ahead + prompt_features(500, 100))


def test_bringing_adapters_in_is_waited_for_and_not_learned_as_prompts() -> None:
    """Every second prompt brings an adapter into a slot first, for four times as long as it takes itself."""
    world, load_ms = World(), 400.0
    world.join("w")
    slot = world.columns.slot("w")
    for number in range(60):
        load = load_ms * (number % 2)
        ahead, loads_ms = world.times.work_ahead(slot, world.now_s)
        assert loads_ms == 0
        features = prompt_features(1000, 0)
        seen_ms = load + 5.0 + 0.1 * 1000
        with world.ledger.charge("w", (1000, 0), load_ms=load):
            total_ms = world.prefill_ms("w", 1000) + load
            assert world.backlog_ms("w") == pytest.approx(total_ms)
            world.now_s += total_ms / 2e3
            assert world.backlog_ms("w") == pytest.approx(total_ms / 2), "it goes down as time passes"
            _, behind_ms = world.times.work_ahead(slot, world.now_s)
            assert behind_ms == pytest.approx(load / 2)
        seen = world.times.saw_prompt(slot, ahead + features, seen_ms, loads_ms + load)
        assert seen is not None and seen.seen_ms == seen_ms
        assert world.columns.own_load_ms[slot] == 0
    assert seen.error < 0.01
    assert world.prefill_ms("w", 1000) == pytest.approx(105.0, rel=0.02)


def test_prompts_that_others_have_computed_alone_are_work_too() -> None:
    """A worker counts them as tokens of sequences, not as prefills."""
    world = World()
    world.join("w")
    slot = world.columns.slot("w")
    world.columns.others_uncached_tokens[slot], world.columns.others_sequences[slot] = 1000, 3
    assert world.backlog_ms("w") == pytest.approx(world.prefill_ms("w", 1000))


def test_with_the_others_work_known_the_whole_queue_is_predicted() -> None:
    """Another proxy sends as much; the worker tells of it at once."""
    world = World(6)
    world.join("w")
    slot, truth, pairs = world.columns.slot("w"), world.truths["w"], []
    foreign: list[tuple[float, int]] = []
    for number in range(600):
        world.until(world.now_s + world.draw.expovariate(1.0 / 1100) / 1e3)
        foreign = [one for one in foreign if one[0] > world.now_s]
        world.columns.others_prefills[slot] = len(foreign)
        world.columns.others_uncached_tokens[slot] = sum(tokens for _, tokens in foreign)
        if number % 2:
            tokens = world.draw.randrange(500, 3000)
            truth.free_s = max(truth.free_s, world.now_s) + np.dot(truth.ms, prompt_features(tokens, 0)) / 1e3
            foreign.append((truth.free_s, tokens))
            continue
        if number > 200:
            pairs.append((world.backlog_ms("w"), world.left_ms("w")))
        world.send("w", world.draw.randrange(500, 3000))
    # Who of them is being computed, and for how long, nobody says: half a prompt more or less.
    assert median_error(pairs, 300) < 0.25


def test_another_worker_in_the_slot_of_one_that_left_starts_from_nothing() -> None:
    world = World(7)
    world.join("old")
    world.join("peer", capacity=STRANGER)
    list(world.arrivals("old", 60))
    world.drain()
    old, peer = world.columns.slot("old"), world.columns.slot("peer")
    for _ in range(20):
        world.times.saw_transfer(old, peer, 1000, 500.0)
        world.times.saw_transfer(peer, old, 1000, 500.0)
        world.times.saw_steps(old, 4, 1000, 700, 90.0)
    world.drop("old")
    world.join("new", capacity=Capacity("else", "other connector"))
    assert world.columns.slot("new") == old
    fresh = World()
    fresh.join("new", capacity=Capacity("else", "other connector"))
    both = np.array([old, peer])
    times = world.times.of(both, world.now_s, 2000, 100, np.array([2000, 2000]))
    alone = fresh.times.of(np.array([0]), 0.0, 2000, 100, np.array([2000]))
    for name in ("prefill_ms", "step_ms", "stall_ms", "seat_ms", "queue_ms", "confidence"):
        assert getattr(times, name)[0] == pytest.approx(getattr(alone, name)[0]), name
    assert times.transfer_ms(np.array([0]), np.array([1]))[0, 0] == pytest.approx(3.0 + 3.0 * 2.0)
    assert world.ledger.of("new").dispatched == 0


def test_more_workers_than_there_was_room_for_keep_what_they_know() -> None:
    world = World(9)
    world.join("else", capacity=Capacity("else", "other connector"))
    names = [f"w{number}" for number in range(12)]
    for number, name in enumerate(names):
        world.join(name, Truth((20.0 * (number + 1), 0.4 * (number + 1), 0.01), noise=0.01))
        list(world.arrivals(name, 60))
        world.drain()
    slots = np.array([world.columns.slot(name) for name in names])
    for p, d in itertools.permutations(slots[:4].tolist(), 2):
        for _ in range(10):
            world.times.saw_transfer(p, d, 2000, 100.0 + 10 * p)

    def moved(slots: Any) -> Any:
        rows = np.arange(len(slots))
        return world.times.of(slots, world.now_s, 2000, 1, np.full(len(slots), 2000)).transfer_ms(rows, rows)

    with world.ledger.charge("w3", (1000, 0)):
        learned, pairs, backlog = [world.prefill_ms(name, 2000) for name in names], moved(slots), world.backlog_ms("w3")
        for number in range(12, 70):
            world.join(f"w{number}")
        assert world.columns.capacity >= 71
        assert [world.prefill_ms(name, 2000) for name in names] == learned
        assert moved(slots) == pytest.approx(pairs)
        assert world.backlog_ms("w3") == backlog > 0
    assert world.backlog_ms("w3") == 0
    newcomers = np.array([world.columns.slot(f"w{number}") for number in range(12, 70)])
    assert len({*slots.tolist(), *newcomers.tolist()}) == 70
    assert moved(newcomers).min() > 90, "pairs that nobody has seen are like those of their connector"


def test_a_pair_not_seen_is_like_its_connectors_others() -> None:
    world = World()
    for name in ("p", "q", "d"):
        world.join(name)
    p, q, d = (world.columns.slot(name) for name in "pqd")
    seen = [world.times.saw_transfer(p, d, tokens, 20.0 + tokens / 50) for tokens in (1000, 4000, 2000, 500) * 10]
    assert all(isinstance(one, Seen) for one in seen)
    times = world.times.of(np.array([p, q, d]), 0.0, 3000, 1, np.array([3000, 3000, 3000]))
    [known], [like] = times.transfer_ms(np.array([0, 1]), np.array([2]))
    assert known == pytest.approx(80.0, rel=0.1)
    assert like == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize(
    ("load", "request_", "ends"),
    [
        pytest.param({"running": 7}, (100, 100), 0, id="a seat is left"),
        pytest.param({"running": 8}, (100, 100), 1, id="one has to end"),
        pytest.param({"running": 8, "waiting": 3}, (100, 100), 4, id="and those that wait"),
        pytest.param({"running": 4, "kv_usage": 0.9}, (2000, 500), 0.15 * 4, id="blocks are short"),
        pytest.param({"running": 4, "kv_usage": 0.5}, (2000, 500), 0, id="blocks suffice"),
    ],
)
def test_a_seat_is_free_when_enough_have_ended(load: dict[str, Any], request_: tuple[int, int], ends: float) -> None:
    world = World()
    world.join("w")
    slot = world.columns.slot("w")
    for name, value in load.items():
        getattr(world.columns, name)[slot] = value
    prompt, output = request_
    times = world.times.of(np.array([slot]), 0.0, prompt, output, np.array([prompt]))
    assert times.seat_ms[0] == pytest.approx(ends * output * times.step_ms[0] / load["running"])


def test_a_seat_is_as_far_as_the_answers_that_hold_it_are_long() -> None:
    """Whoever asks for few tokens waits no less behind long answers, and a long one no longer behind short ones."""
    world = World()
    for name in ("long", "short", "others"):
        world.join(name)
    slots = np.array([world.columns.slot(name) for name in ("long", "short", "others")])
    nothing = np.zeros(3, np.int64)
    world.columns.running[slots] = 8

    def seat_steps(output_tokens: int) -> list[float]:
        times = world.times.of(slots, 0.0, 0, output_tokens, nothing)
        return (times.seat_ms / times.step_ms).tolist()

    with ExitStack() as answers:
        charges = [answers.enter_context(world.ledger.charge("long", None, 1600)) for _ in range(8)]
        for _ in range(8):
            answers.enter_context(world.ledger.charge("short", None, 16))
            # Prompts alone have no answer that would end.
            answers.enter_context(world.ledger.charge("short", (1, 0)))
        world.columns.own_requests[slots[1]] = 8
        world.columns.running[slots[1]] = 8
        assert seat_steps(16) == pytest.approx([200, 2, 2])
        assert seat_steps(1600) == pytest.approx([200, 2, 200])
        for charge in charges:
            charge.received(1600)
        assert seat_steps(16)[0] == pytest.approx(200), "longer than believed: no nearer its end than one just begun"
    assert seat_steps(16) == pytest.approx([2, 2, 2]), "no answer of this proxy is left there"


def test_a_step_counts_who_is_on_the_way() -> None:
    world = World()
    world.join("w")
    slots, nothing = np.array([world.columns.slot("w")]), np.array([0])
    idle = world.times.of(slots, 0.0, 0, 1, nothing).step_ms[0]
    with world.ledger.charge("w", None, 10), world.ledger.charge("w", None, 10):
        world.columns.others_sequences[slots] = 3
        assert world.times.of(slots, 0.0, 0, 1, nothing).step_ms[0] == pytest.approx(idle + 5 * Priors().step[1])
        world.columns.running[slots] = 9
        assert world.times.of(slots, 0.0, 0, 1, nothing).step_ms[0] == pytest.approx(idle + 9 * Priors().step[1])


def test_nobody_is_free_before_the_first_answer_of_its_kind() -> None:
    """Where the prior is ten times too short, ten prompts would queue behind it."""
    assert Priors().prompt == (10.0, 0.1, 0.001)
    world = World()
    for name in ("a", "b"):
        world.join(name, Truth((100.0, 1.0, 0.01), noise=0.0))
    a_ms = 10 * float(np.dot(Priors().prompt, prompt_features(1000, 0)))
    world.send("a", 1000)
    assert world.free_in_ms("b") == 0
    world.send("b", 4000)
    world.until(a_ms / 5e3)
    assert min(world.free_in_ms("a"), world.free_in_ms("b")) >= 1000 > world.backlog_ms("a")
    world.until(a_ms / 1e3)
    assert world.free_in_ms("a") == 0
    assert world.free_in_ms("b") == pytest.approx(world.left_ms("b"), rel=0.2)


def test_unknown_workers_teach_nothing() -> None:
    world = World()
    assert world.times.saw_prompt(3, prompt_features(10, 0), 5.0) is None
    assert world.times.saw_steps(3, 1, 1, 1, 5.0) is None
    assert world.times.saw_transfer(0, 1, 10, 5.0) is None
    assert dict(world.times.confidence()) == {"prefill": 0.0, "step": 0.0, "transfer": 0.0}
    world.times.leave(3)
