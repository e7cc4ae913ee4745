"""What is secret, and texts without it."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"(key|secret|token|password|passwd|passphrase|credentials?|connection_string)$", re.I)
"""The end of the name of an option whose value must not be shown, even if it is a number."""

LITERAL_OPTIONS = frozenset([
    "access", "account_host", "account_name", "client_id", "consistency", "default_cache_type", "default_location",
    "endpoint_url", "host", "location_mode", "profile", "project", "region", "region_name", "requester_pays",
    "tenant_id",
    "client_kwargs.api_version", "client_kwargs.aws_account_id", "client_kwargs.endpoint_url",
    "client_kwargs.region_name", "client_kwargs.verify",
    "config_kwargs.account_id_endpoint_mode", "config_kwargs.auth_scheme_preference", "config_kwargs.defaults_mode",
    "config_kwargs.region_name", "config_kwargs.request_checksum_calculation",
    "config_kwargs.response_checksum_validation", "config_kwargs.retries.mode", "config_kwargs.s3.addressing_style",
    "config_kwargs.s3.us_east_1_regional_endpoint", "config_kwargs.signature_version",
    "s3_additional_kwargs.ACL", "s3_additional_kwargs.ChecksumAlgorithm", "s3_additional_kwargs.ExpectedBucketOwner",
    "s3_additional_kwargs.SSECustomerAlgorithm", "s3_additional_kwargs.SSEKMSKeyId",
    "s3_additional_kwargs.ServerSideEncryption", "s3_additional_kwargs.StorageClass",
])  # fmt: skip
"""Options of s3fs, gcsfs and adlfs whose text is no secret, by their dotted names. Secrets have names without end
(sas, headers.Authorization, ...), so that what is harmless is listed, and all else is taken for one."""

REFERENCE = re.compile(r"\$(\w+|\{\w+\})")
"""An option that names the environment variable which holds its value."""

_VARIABLES = re.compile(r"^(AWS|AZURE|GOOGLE|GCS|WANDB|MLFLOW)_.*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION_STRING)$")
_known: set[str] = set()


def must_be_reference(option: str, value: object) -> bool:
    """Whether an option, such as client_kwargs.region_name, may only name the variable that holds its value."""
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, (int, float)):
        return SECRET_NAME.search(option) is not None
    return option not in LITERAL_OPTIONS or not isinstance(value, str)


def remember(secret: str) -> None:
    """From now on `masked` hides this value."""
    if secret:
        _known.add(secret)


def masked(text: str) -> str:
    """`text` with *** for every remembered secret and for those in the usual variables of this process."""
    secrets = _known | {value for name, value in os.environ.items() if _VARIABLES.match(name) and value}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another, whose rest would be left
        text = text.replace(secret, "***")
    return text
