"""What the documents name is there, and what operators need is named in them."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from omni_common.command import help_of

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("proxy", "prefill", "decode", "kvstore", "placement")
OF_COMMANDS = {"OMNI_CLI_API_KEY", "OMNI_CLI_HOME", "OMNI_ALLOW_NO_WHEELS", "OMNI_NPU_IMPORT"}
"""Variables of the command line and of tests."""
FOLDERS = ("bench", "cli", "docs", "libs", "models", "proto", "services")
FOUND = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
PAGES = sorted(page for page in FOUND if page.name != "CHANGELOG.md")
of_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def anchors(page: Path) -> set[str]:
    """What links may name of a page: its headings, as they are shown on the web."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def settings() -> set[str]:
    """Variables of all services, as their help lists them."""
    names: set[str] = set()
    for service in SERVICES:
        cls = importlib.import_module(f"omni_{service}.settings").Settings
        found = re.findall(r"^  OMNI_(\w+)", help_of(cls), re.MULTILINE)
        own = f"{service.upper()}_"
        names |= {f"OMNI_{own}{name.removeprefix(own)}" for name in found} | {f"OMNI_{name}" for name in found}
        names.add(f"OMNI_{own}CONFIG")
    return names


@of_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@of_page
def test_variables_are_settings(page: Path) -> None:
    """A service refuses an `OMNI_*` name that it does not know, so a misspelt one here costs a reader the start."""
    composed = {name for f in ROOT.glob("docker-compose*.yml") for name in re.findall(r"\$\{(\w+)", f.read_text())}
    named = set(re.findall(r"\bOMNI_[A-Z0-9_]*[A-Z0-9]\b(?!_)", page.read_text()))
    of_the_command = {name for name in named if name.replace("OMNI_CLI_TLS__", "OMNI_TLS__") in settings()}
    assert named - settings() - composed - OF_COMMANDS - of_the_command == set()


def test_every_setting_is_in_a_document() -> None:
    """By its last part, or by the end of that after `...` where settings in a row have the rest in common."""
    text = " ".join(page.read_text() for page in PAGES).upper()
    words = {part for word in re.findall(r"\w+", text) for part in word.split("__")}
    ends = tuple(re.findall(r"\.\.\.(_\w+)", text))
    of_one = "|".join(f"{service.upper()}_" for service in SERVICES)
    fields = {re.sub(rf"^OMNI_({of_one})?", "", name).split("__")[-1] for name in settings()}
    assert {field for field in fields - words if not field.endswith(ends)} == set()


def test_every_metric_is_in_a_document() -> None:
    pattern = r'"omni_((?:proxy|worker|engine|kvstore|placement)_\w+)"'
    sources = [*ROOT.glob("services/*/src/**/*.py"), *ROOT.glob("libs/*/src/**/*.py")]
    defined = {name.removesuffix("_total") for path in sources for name in re.findall(pattern, path.read_text())}
    text = " ".join(page.read_text() for page in PAGES)

    def documented(name: str) -> bool:
        """In full, or after a prefix that its page names once for all."""
        ends = [name.split("_", count)[-1] for count in (1, 2)] if "_prefix_" in name else [name.split("_", 1)[1]]
        return any(re.search(rf"(?<![a-z]){end}(_total)?(?![a-z_])", text) for end in ends)

    assert {name for name in defined if not documented(name)} == set()
