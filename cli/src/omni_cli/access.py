"""How a proxy is reached: its URL, the key it may ask for, and what to say where it cannot be."""

import os

import httpx

from omni_cli.errors import InvalidOptions
from omni_common.addresses import LAST_PORT

VARIABLE = "OMNI_CLI_API_KEY"


def key_headers() -> dict[str, str]:
    """Headers of every request to a proxy; none while the variable is not set."""
    key = os.environ.get(VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}


def base_url(given: str) -> str:
    """`host:port` is taken for http. Raises InvalidOptions where no proxy could be."""
    url = given if "://" in given else f"http://{given}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > LAST_PORT:
        raise InvalidOptions(f"--url {given!r}: write http://host:port")
    return url.rstrip("/")


def why(error: Exception) -> str:
    """Why a request to a proxy brought no answer."""
    if isinstance(error, httpx.HTTPError):
        return str(error) or type(error).__name__
    return "the answer is not a proxy's"
