"""The command line of a service: settings come from its environment; `--help` lists them.

And how the help of commands ends.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from omni_common.errors import InvalidRequest
from omni_common.settings import ServiceSettings, part_of

_WIDTH = 100
S = TypeVar("S", bound=ServiceSettings)


def settings_of(cls: type[S], arguments: Sequence[str], usage: str = "") -> S:
    """Read the settings. Ends the process with 0 after `--help`, with 2 where an argument or a setting is wrong.

    `usage` is what the service takes besides, as its help shows it.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(help_of(cls, usage))
        raise SystemExit(0)
    try:
        if arguments:
            raise InvalidRequest(f"unexpected argument {arguments[0]!r}; --help lists the settings")
        return cls.load()
    except InvalidRequest as error:
        print(f"omni-{cls.service}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def help_of(cls: type[ServiceSettings], usage: str = "") -> str:
    """Every setting by its variable: its default and what it means."""
    prefix = f"OMNI_{cls.service.upper()}_"
    shared = set(ServiceSettings.model_fields)
    return "\n".join(
        [
            f"usage: omni-{cls.service} {usage}".rstrip(),
            "",
            f"Settings are environment variables, or fields of the YAML file that {prefix}CONFIG names:",
            "",
            *_lines(cls, prefix, set(cls.model_fields) - shared),
            "",
            f"Of every service; {prefix}... sets one for this service alone:",
            "",
            *_lines(cls, "OMNI_", shared),
        ]
    )


def examples(*lines: str, exit_codes: str = "") -> str:
    """The end of a command's help."""
    head = f"Exit code: {exit_codes}.\n\n" if exit_codes else ""
    return head + "\n".join(("Examples:", *(f"  {line}" for line in lines)))


def _lines(model: type[BaseModel], prefix: str, names: set[str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name not in names:
            continue
        if (part := part_of(field.annotation)) is not None:
            yield from _lines(part, f"{prefix}{name.upper()}__", set(part.model_fields))
            continue
        yield f"  {prefix}{name.upper()}{_default(field)}"
        if field.description:
            yield from textwrap.wrap(field.description, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    value = field.default
    if isinstance(value, str | int | float | Path) and value != "":
        return f"={str(value).lower() if isinstance(value, bool) else value}"
    return ""
