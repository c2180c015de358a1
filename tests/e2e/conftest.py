import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live import LiveStack, OtlpReceiver, live_stack

# Loading two engines on a busy machine takes a minute or two; the tests of this folder share them.
pytestmark = pytest.mark.timeout(600)
SMALL = ("--kv-cache-gib", "0.25", "--max-model-len", "4096")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the stack that several files share come last, so that no other stack runs beside it."""
    items.sort(key=lambda item: "otlp" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure beside a stack that several tests share shows the ends of its logs."""
    report = yield
    used = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(used, LiveStack):
        report.sections.append(("last words", used.last_words()))
    return report


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="session")
def stack(otlp: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """One prefill and one decode worker on real vLLM engines."""
    home = tmp_path_factory.mktemp("stack")
    # Prompts here are so short that by default decode would compute most of them itself.
    environ = {"OMNI_PROXY_POLICY": "least_uncached_tokens"}
    with live_stack(home, "--otlp", otlp.endpoint, *SMALL, environ=environ) as running:
        yield running


@pytest.fixture
def sdk(stack: LiveStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", timeout=60, max_retries=0) as client:
        yield client
