"""How the tests share a machine: which go to one process of `-n`, and in which order."""

import pytest

STACKS = ("tests/e2e/", "tests/chaos/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file's tests stay together, for its fixtures; those that start stacks too, so that one runs at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "stacks" if file.startswith(STACKS) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones begin first: short files are left to even out the end."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.nodeid.startswith(STACKS):
        return 0
    return 1 if item.get_closest_marker("engine") else 2
