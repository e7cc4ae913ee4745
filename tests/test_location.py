"""Places for objects: what is refused, and that no secret is shown."""

from __future__ import annotations

from glob import has_magic

import pytest

from relora_ray.location import location_problem, secret_in_url, shown


@pytest.mark.parametrize(
    "url",
    [
        "runs", "./runs", "/data/runs/", "/data/team@x/runs", "/", "~/runs", "file:///data/runs", "s3://bucket",
        "s3://bucket/runs/", "s3://bucket/my runs/a.b..c", "gs://bucket/Läufe", "hdfs:///runs", "hdfs://host:8020/runs",
        "abfss://container@account.dfs.core.windows.net/runs", "s3://host/data/a@5", "memory://runs",
    ],
)  # fmt: skip
def test_place_is_taken(url: str) -> None:
    assert location_problem(url) == ""
    assert shown(url) == repr(url)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("", "is blank"),
        (" runs", "spaces around"),
        ("s3:/bucket", "half a URL"),
        ("S3:/bucket", "half a URL"),
        ("s3://", "half a URL"),
        ("s3:///bucket/runs", "half a URL"),
        ("file://runs", "is relative"),
        ("s3://bucket/run*", "has a *"),
        ("s3://bucket/run[1]", "has a ["),
        ("s3://bucket/run]", "has a ]"),
        ("s3://bucket/{a,b}", "has a {"),
        ("s3://bucket/a}", "has a }"),
        ("/data/run?", "has a ?"),
        ("/data/run#1", "has a #"),
        ("/data/run\\1", "has a \\"),
        ("s3://bucket/../other", "part . or .."),
        ("s3://bucket/./other", "part . or .."),
        ("../runs", "part . or .."),
        ("/data/..", "part . or .."),
        ("s3://bucket//runs", "empty part"),
        ("s3://bucket/runs//", "empty part"),
        ("//data/runs", "empty part"),
        ("file:////data", "empty part"),
        ("s3://bucket/a\nb", "character '\\n', which cannot be seen"),
        ("/data/a\x7f", "which cannot be seen"),
        ("/data/a\u200bb", "which cannot be seen"),
        ("s3://bucket/a::memory", "has a ::"),
        ("ftp://host/runs", "is of scheme ftp:, where objects cannot be kept"),
        ("http://host:9000/data/a@5", "is of scheme http:"),
        ("zip://runs.zip", "is of scheme zip:"),
        ("s4://bucket/runs", "is of scheme s4:"),
        ("filecache::s3://bucket/a", "half a URL"),
    ],
)
def test_place_that_may_be_another_is_refused(url: str, rule: str) -> None:
    assert rule in location_problem(url)


def test_every_pattern_of_fsspec_is_refused() -> None:
    """It asks glob.has_magic before it deletes."""
    magic = [chr(code) for code in range(32, 127) if has_magic(chr(code))]
    assert {"*", "?", "["} <= set(magic)
    for char in magic:
        assert location_problem(f"s3://bucket/a{char}b")
        assert location_problem(f"/data/a{char}b")


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("s3://key:hunter2@bucket/x", "'s3://***@bucket/x'"),
        ("s3://key:hun/ter2@bucket/x", "'s3://***@bucket/x'"),
        ("s3://key:it's hunter2@bucket", "'s3://***@bucket'"),
        ("https://hunter2@host/x", "'https://***@host/x'"),
        ("abfss://container:hunter2@account/x", "'abfss://***@account/x'"),
        ("https://account.blob/x?sig=hunter2", "'https://account.blob/x?***'"),
        ("https://host/x#token='hunter2 \nhunter2", "'https://host/x?***'"),
        ("http://host:9000/a:hunter2@b?sig=hunter2", "'http://***@b?***'"),
    ],
)
def test_url_with_a_secret_is_refused_and_not_shown(url: str, safe: str) -> None:
    assert secret_in_url(url)
    assert "hunter2" not in secret_in_url(url) + location_problem(url)
    assert location_problem(url)
    assert shown(url) == safe
