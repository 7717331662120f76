"""Tenants from a file: what the router is told, and what keys say."""

from pathlib import Path

import pytest

from disagg.base.errors import ConfigurationError
from disagg.base.tenants import TenantSettings
from disagg.cli.tenants_file import read_tenants


def write(folder: Path, text: str) -> Path:
    file = folder / "tenants.yaml"
    file.write_text(text)
    return file


def test_what_a_tenant_has_and_its_key_are_told_apart(tmp_path: Path) -> None:
    text = "tenants: [{name: a, key: sk-a, weight: 3, service_class: chat}, {name: b, max_requests: 8}]"
    found = read_tenants(write(tmp_path, text))
    assert found.settings() == {
        "a": TenantSettings(weight=3, service_class="chat"),
        "b": TenantSettings(max_requests=8),
    }
    assert found.keys() == {"sk-a": "a"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenants: [{name: a}, {name: a}]", "two tenants have the same name"),
        ("tenants: [{name: a, key: k}, {name: b, key: k}]", "two tenants have the same key"),
        ("tenants: [{name: a, service_clas: chat}]", r"did you mean service_class\?"),
        ("tenants: [{name: a, service_class: a b}]", r"tenants\[0\].service_class"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_tenants(write(tmp_path, text))
