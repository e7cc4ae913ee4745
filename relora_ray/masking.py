"""What is secret, and texts without it."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"(key|secret|token|password|passwd|passphrase|credentials?|connection_string)$", re.I)
"""The end of the name of an option or variable whose value must not be shown."""

REFERENCE = re.compile(r"\$(\w+|\{\w+\})")
"""An option that names the environment variable which holds its value."""

_VARIABLES = re.compile(r"^(AWS|AZURE|GOOGLE|GCS)_.*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION_STRING)$")
_known: set[str] = set()


def remember(secret: str) -> None:
    """From now on `masked` hides this value."""
    if secret:
        _known.add(secret)


def masked(text: str) -> str:
    """`text` with *** for every remembered secret and for those in the usual variables of this process."""
    for secret in _known | {value for name, value in os.environ.items() if _VARIABLES.match(name) and value}:
        text = text.replace(secret, "***")
    return text
