"""What can go wrong with a stack on this machine. Messages say what to do; `main` prints them and exits.

CliError
├── InvalidOptions     options that contradict each other or the machine
│   ├── NotEnoughMemory
│   └── PortTaken
├── StackExists        a stack of that name is running
├── NoSuchStack        no state is recorded under that name
├── StartFailed        a service died or was not healthy in time
└── NoAnswer           the proxy refused or broke off
"""

from typing import ClassVar


class CliError(Exception):
    """Root of the errors that `main` shows without a traceback."""

    exit_code: ClassVar[int] = 1


class InvalidOptions(CliError):
    exit_code = 2


class NotEnoughMemory(InvalidOptions):
    pass


class PortTaken(InvalidOptions):
    pass


class StackExists(CliError):
    pass


class NoSuchStack(CliError):
    exit_code = 4


class StartFailed(CliError):
    """`service` is the one that failed; its log tail was shown."""

    def __init__(self, service: str, message: str) -> None:
        super().__init__(message)
        self.service = service


class NoAnswer(CliError):
    pass
