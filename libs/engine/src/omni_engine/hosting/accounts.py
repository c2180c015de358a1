"""Whose work the worker has: what each proxy gave it that has not ended. And what prompts took that have."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass(slots=True)
class Account:
    """Prefills not answered, sequences not ended, and the prompt tokens that both still have to compute."""

    prefills: int = 0
    sequences: int = 0
    uncached_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.prefills or self.sequences)


@dataclass(slots=True)
class Computed:
    """Prompts that were computed, their uncached tokens, and the wall time in which some prompt was on its way."""

    prompts: int = 0
    tokens: int = 0
    busy_s: float = 0.0


class Share:
    """One piece of work on its proxy's account. Leaving the block closes it; closing twice changes nothing."""

    __slots__ = ("_accounts", "_computes", "_prefills", "_proxy_id", "_sequences", "_uncached_tokens")

    def __init__(
        self,
        accounts: "Accounts",
        proxy_id: str,
        prefills: int,
        sequences: int,
        uncached_tokens: int,
        computes: bool,
    ) -> None:
        """`computes`: a prompt, rather than pulling its blocks."""
        self._accounts = accounts
        self._computes = computes
        self._proxy_id = proxy_id
        self._prefills, self._sequences, self._uncached_tokens = prefills, sequences, uncached_tokens
        accounts.add(proxy_id, prefills, sequences, uncached_tokens)
        if computes:
            accounts.prompt_begins()

    def computed(self, tokens: int) -> None:
        """The prompt is there, after so many of its tokens were computed; the work goes on."""
        self._take_back(0, 0, self._uncached_tokens)
        self._end_prompt(tokens)

    def close(self) -> None:
        """The work has ended, however it did."""
        self._take_back(self._prefills, self._sequences, self._uncached_tokens)
        self._end_prompt(None)

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _end_prompt(self, tokens: int | None) -> None:
        """Once; not for a prompt that is pulled."""
        if self._computes:
            self._computes = False
            self._accounts.prompt_ends(tokens)

    def _take_back(self, prefills: int, sequences: int, uncached_tokens: int) -> None:
        self._prefills -= prefills
        self._sequences -= sequences
        self._uncached_tokens -= uncached_tokens
        self._accounts.add(self._proxy_id, -prefills, -sequences, -uncached_tokens)


class Accounts:
    """An account for each proxy that has work here. Work without a proxy's name is everybody else's."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: seconds."""
        self._now = now
        self._computing = 0
        self._busy_since_s = 0.0
        self.computed = Computed()
        self._all = Account()
        self._by_proxy: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._by_proxy)

    @property
    def all(self) -> Account:
        """A copy of the sum of all accounts."""
        return Account(self._all.prefills, self._all.sequences, self._all.uncached_tokens)

    def prefill(self, proxy_id: str, uncached_tokens: int) -> Share:
        return Share(self, proxy_id, 1, 0, uncached_tokens, computes=True)

    def sequence(self, proxy_id: str, uncached_tokens: int, *, pulls: bool = False) -> Share:
        """`pulls`: the prompt's blocks are computed elsewhere."""
        return Share(self, proxy_id, 0, 1, uncached_tokens, computes=not pulls)

    def others(self, proxy_id: str) -> Account:
        """The work of all but the proxy named; nothing for one that has no name."""
        if not proxy_id:
            return Account()
        total, own = self._all, self._by_proxy.get(proxy_id, Account())
        return Account(
            total.prefills - own.prefills,
            total.sequences - own.sequences,
            total.uncached_tokens - own.uncached_tokens,
        )

    def add(self, proxy_id: str, prefills: int, sequences: int, uncached_tokens: int) -> None:
        """Change an account; one that has become empty is dropped."""
        account = self._by_proxy.setdefault(proxy_id, Account())
        for changed in (self._all, account):
            changed.prefills += prefills
            changed.sequences += sequences
            changed.uncached_tokens += uncached_tokens
        if account.is_empty:
            del self._by_proxy[proxy_id]

    def prompt_begins(self) -> None:
        if not self._computing:
            self._busy_since_s = self._now()
        self._computing += 1

    def prompt_ends(self, tokens: int | None) -> None:
        """`tokens`: computed of it; None where it was given up."""
        self._computing -= 1
        now_s = self._now()
        self.computed.busy_s += now_s - self._busy_since_s
        self._busy_since_s = now_s
        if tokens is not None:
            self.computed.prompts += 1
            self.computed.tokens += tokens
