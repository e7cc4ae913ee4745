"""Which folders and URLs may name a place for objects, and which URLs carry a secret. Values are shown here nowhere.

`location_problem("s3://bucket/run*")` is "has a '*', which ...": put the key and `shown(value)` in front of it.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_KEEPERS = ("file", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "obs", "hdfs", "memory")
"""Schemes of what takes whole objects and has them listed by whoever wrote them: object stores and file systems."""
_HOSTLESS = ("file", "hdfs", "memory")
"""Schemes whose URLs may begin with a path."""
_ACCOUNT_BEHIND = ("abfs", "abfss", "az")
"""Schemes of Azure, where container@account is no user: abfss://container@account.dfs.core.windows.net/runs."""
_PASSWORD = re.compile(r":(?!\d{1,5}/[^@]*@\d+$)[^@]*@")
"""After the scheme. A password may have slashes, and begin like a port: behind one, only a run's @STEP is none."""
_SPECIAL = re.compile(r"[*?\[\]{}#\\]")


def secret_in_url(text: str) -> str:
    """The rule that a URL breaks which carries a secret (a user, a password, a signature), and what to do; "" if none
    does. What is no URL carries none."""
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return ""
    rest = unquote(rest)  # %3A and %40 are : and @
    if _PASSWORD.search(rest) or ("@" in rest.partition("/")[0] and scheme.lower() not in _ACCOUNT_BEHIND):
        return (
            "must not carry credentials in its URL: URLs are stored and shown. Use the usual environment variables, or "
            "storage_options that name some."
        )
    if re.search(r"[?#]", rest):
        return (
            "must not have a query or a fragment (what follows ? or #): it may be a signature, and URLs are stored and "
            "shown. Leave it out, and give credentials in environment variables."
        )
    return ""


def location_problem(url: str) -> str:
    """The rule that a folder or URL breaks, and what to do, as the end of a sentence that begins with the value; "" if
    it can be a place for objects.

    Patterns are refused because fsspec expands `*`, `?` and `[` when it deletes: those of a neighbour would go.
    """
    if not url.strip() or url != url.strip():
        return "is blank or has spaces around it. Give a folder or a URL."
    if hidden := next((c for c in url if not c.isprintable()), ""):
        return f"has the character {hidden!r}, which cannot be seen. Remove it."
    if problem := secret_in_url(url):
        return problem
    found = re.match(r"([a-z][a-z0-9+.-]+):(//)?(.*)", url, re.IGNORECASE)
    scheme, path = (found[1].lower(), found[3]) if found else ("", url)
    if found and (not found[2] or not path.strip("/") or (path.startswith("/") and scheme not in _HOSTLESS)):
        return "is half a URL. Write it as scheme://bucket/prefix, such as s3://bucket/runs."
    if scheme and scheme not in _KEEPERS:
        return (
            f"is of scheme {scheme}:, where objects cannot be kept: they must be written whole, listed and deleted by "
            f"name. Use a folder, s3://, gs:// or abfss://."
        )
    if scheme == "file" and not path.startswith("/"):
        return "is relative: a file:// URL must be absolute, such as file:///data/runs."
    if special := _SPECIAL.search(path):
        return (
            f"has a {special[0]}, which file systems do not all take literally: as a pattern it would name and "
            f"delete what others wrote. Use letters, digits, dashes, underscores and single dots."
        )
    if found and "::" in path:
        return "has a ::, which would chain file systems. Give one URL."
    parts = path.removeprefix("/").removesuffix("/").split("/")
    if "" in parts and path != "/":
        return "has an empty part (//), which some clients keep and others drop. Write a single slash."
    if ".." in parts or (found and "." in parts):
        return "has a part . or .., which object stores keep as a name and others resolve. Write the path out."
    return ""


def shown(value: object) -> str:
    """`repr` of a value, with *** for what may be a secret in a URL."""
    if not isinstance(value, str) or not secret_in_url(value):
        return repr(value)
    return repr(re.sub(r"[?#].*", "?***", re.sub(r"://.*@", "://***@", value, flags=re.DOTALL), flags=re.DOTALL))
