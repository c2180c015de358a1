"""Names of strategies, checked against the table they come from."""

import difflib
from collections.abc import Collection


def known_name(name: str, known: Collection[str]) -> str:
    """`name`, if it is one of `known`.

    Raises:
        ValueError: it is not; the message names the nearest one and all of them.
    """
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise ValueError(f"unknown {name!r}{hint} known: {', '.join(sorted(known))}")
