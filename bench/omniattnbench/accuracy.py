"""What patterns of the same KV bytes are worth: searched for on some held-out questions, judged on others."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

from omni_kernels.patterns.decoding import Decoder
from omni_kernels.patterns.pattern import Layer, Pattern
from omni_kernels.patterns.search import METHODS, Candidate, Goal, Score, Search, Space, samples


@dataclass(frozen=True, slots=True)
class Row:
    """`share` of full attention's KV bytes; `scored` patterns were asked for to find it."""

    name: str
    layers: str
    share: float
    accuracy: float
    perplexity: float
    scored: int


Scorer = Callable[[Candidate], Score]


def say(count: int, candidate: Candidate, share: float, score: Score) -> None:
    print(f"{count:4} {share:.2%} {score.accuracy:.3f} {text(candidate)}", file=sys.stderr, flush=True)


def text(candidate: Candidate) -> str:
    return " ".join("full" if layer is None else str(layer) for layer in candidate)


def compare(
    shape: Decoder,
    score: Scorer,
    judge: Scorer,
    choices: tuple[Layer, ...],
    share: float,
    context: int,
    seed: int,
    chance: int,
) -> tuple[list[Row], dict[str, dict[Candidate, Score]]]:
    """Full attention, the searches, and the middle, best and worst of random patterns with the found one's bytes."""
    full = Pattern("tiny-moe", shape.block_size, shape.token_bytes, (None,) * shape.num_layers)
    space = Space(full, choices, context)

    def row(name: str, candidate: Candidate, scored: int) -> Row:
        judged = judge(candidate)
        return Row(name, text(candidate), space.share(candidate), judged.accuracy, judged.perplexity, scored)

    rows, runs = [row("full attention", full.layers, 0)], {}
    for method in ("genetic", "greedy"):
        run = Search(space, Goal(share=share), score, say)
        rows.append(row(method, METHODS[method](run, seed), len(run.seen)))
        runs[method] = run.seen
    least = rows[1].share
    drawn = samples(space, rows[1].share, seed, chance, at_least=0.95 * least)
    random_rows = sorted((row("random", candidate, 0) for candidate in drawn), key=lambda r: r.accuracy)
    middle = statistics.median(r.accuracy for r in random_rows)
    perplexity = statistics.median(r.perplexity for r in random_rows)
    rows += [
        Row(f"random, median of {len(drawn)}", "", least, middle, perplexity, 0),
        Row("random, best", *_values(random_rows[-1])),
        Row("random, worst", *_values(random_rows[0])),
    ]
    return rows, runs


def _values(row: Row) -> tuple[str, float, float, float, int]:
    return row.layers, row.share, row.accuracy, row.perplexity, row.scored
