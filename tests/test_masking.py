"""Which options may be written out, and texts without secrets."""

from __future__ import annotations

import inspect

import botocore.session
import pytest
import s3fs
from botocore.config import Config

from relora_ray import masking
from relora_ray.errors import ConfigError
from relora_ray.masking import LITERAL_OPTIONS, masked, must_be_reference
from relora_ray.storage import _resolved, parse_options


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())


@pytest.mark.parametrize(
    "option",
    [
        "key", "secret", "token", "username", "password",  # s3fs
        "client_kwargs.aws_access_key_id", "client_kwargs.aws_session_token", "client_kwargs.headers.Authorization",
        "config_kwargs.client_cert", "config_kwargs.proxies.https", "s3_additional_kwargs.SSECustomerKey",
        "session_kwargs.headers.Authorization",  # gcsfs
        "account_key", "connection_string", "credential", "sas_token", "sas", "client_secret",  # adlfs
        "Endpoint_Url", "endpoint_url.x", "x.endpoint_url",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_harmless_must_be_a_reference(option: str) -> None:
    assert must_be_reference(option, "text")
    assert must_be_reference(option, ["text"])


def test_numbers_are_harmless_unless_the_name_says_otherwise() -> None:
    for value in (True, None, 3, 1.5):
        assert not must_be_reference("max_concurrency", value)
    assert must_be_reference("secret", 1234)
    assert not must_be_reference("requester_pays", True)


def test_options_that_may_be_written_out_exist() -> None:
    """Against the signatures of s3fs and botocore, as far as they name them; the rest is gcsfs's and adlfs's."""
    known = {
        "client_kwargs": set(inspect.signature(botocore.session.Session.create_client).parameters),
        "config_kwargs": set(Config.OPTION_DEFAULTS),
        "s3_additional_kwargs": set(
            botocore.session.get_session().get_service_model("s3").operation_model("PutObject").input_shape.members
        ),
    }
    nested = [option.split(".") for option in LITERAL_OPTIONS if "." in option]
    assert {section for section, *_ in nested} == set(known)
    for section, name, *_ in nested:
        assert name in known[section]
    of_s3fs = set(inspect.signature(s3fs.S3FileSystem.__init__).parameters)
    of_others = {
        "access", "account_host", "account_name", "client_id", "consistency", "default_location", "host",
        "location_mode", "profile", "project", "region", "region_name", "tenant_id",
    }  # fmt: skip
    assert {option for option in LITERAL_OPTIONS if "." not in option} <= of_s3fs | of_others


def test_secret_of_the_command_line_is_remembered_whatever_its_name() -> None:
    options = parse_options(
        [
            "sas=hunter2",
            "client_kwargs={headers: {Authorization: hunter3}, cookies: [hunter4]}",
            "endpoint_url=http://x:9",
        ]
    )
    assert _resolved(options) == options
    assert masked("hunter2 hunter3 hunter4 http://x:9") == "*** *** *** http://x:9"


def test_value_of_a_reference_is_remembered_also_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VALUE", "hunter2")
    assert _resolved({"endpoint_url": "$SOME_VALUE", "x": ["${SOME_VALUE}"]}) == {
        "endpoint_url": "hunter2",
        "x": ["hunter2"],
    }
    assert masked("at hunter2") == "at ***"


def test_secret_that_holds_another_is_masked_whole() -> None:
    for length in range(3, 20):
        masking.remember("hunter2-and-much-more"[:length])
    assert masked("hunter2-and-much-m") == "***"


@pytest.mark.parametrize(
    ("item", "rule"),
    [
        ("secret:hunter2", "storage option 'secret' is not of the form key=value"),
        ("=hunter2", "storage option '' is not of the form key=value"),
        ("secret=[hunter2", "storage option secret=... is not valid YAML"),
        ("secret=*hunter2", "storage option secret=... is not valid YAML"),
        ("endpoint_url=http://a:hunter2@host", r"storage option endpoint_url='http://***@host' must not carry"),
        (
            "client_kwargs={endpoint_url: 'http://x/?sig=hunter2'}",
            "client_kwargs.endpoint_url='http://x/?***' must not",
        ),
    ],
)
def test_refused_option_of_the_command_line_is_not_shown(item: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options([item])
    assert rule in str(caught.value)
    assert "hunter2" not in str(caught.value)
