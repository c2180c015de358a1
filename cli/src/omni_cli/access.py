"""How a proxy is reached: its URL, the key it may ask for, whom to trust, and what to say where it cannot be."""

import os
import ssl
from typing import Any

import httpx

from omni_cli.errors import InvalidOptions
from omni_common.addresses import LAST_PORT
from omni_common.settings import tls_of_command

VARIABLE = "OMNI_CLI_API_KEY"
_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "is its authority in OMNI_TLS__CA_FILE?",
    "WRONG_VERSION_NUMBER": "it answers without TLS; write http://",
    "Server disconnected without sending a response": "does it want https://?",
}
"""What httpx says where the two sides do not agree on TLS."""


def http_options() -> dict[str, Any]:
    """Of every HTTP client: the key, where it is set, and the authorities of this machine and of OMNI_TLS__CA_FILE."""
    key = os.environ.get(VARIABLE)
    trusted = ssl.create_default_context()
    if authority := tls_of_command().ca_file:
        trusted.load_verify_locations(authority)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return {"trust_env": False, "verify": trusted, "headers": headers}


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


def tls_failure(error: httpx.HTTPError) -> str:
    """What to look at where the two sides did not agree on TLS; empty where nothing points to that."""
    return next((hint for sign, hint in _HINTS.items() if sign in str(error)), "")


def why(error: Exception) -> str:
    """Why a request to a proxy brought no answer."""
    if isinstance(error, httpx.HTTPError):
        said, hint = str(error) or type(error).__name__, tls_failure(error)
        return f"{said}: {hint}" if hint else said
    return "the answer is not a proxy's"
