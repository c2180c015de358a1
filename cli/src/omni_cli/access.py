"""The key for proxies that ask for one."""

import os

VARIABLE = "OMNI_CLI_API_KEY"


def key_headers() -> dict[str, str]:
    """Headers of every request to a proxy; none while the variable is not set."""
    key = os.environ.get(VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}
