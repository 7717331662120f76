"""What ``--cluster`` may say, and that nobody needs Ray who does not say it."""

import subprocess
import sys

import pytest

from disagg.base.errors import ConfigurationError

CHECK = """
import sys
import click.testing
from disagg.cli.main import main
for arguments in (["--help"], ["serve", "--help"], ["plan", "--help"]):
    assert click.testing.CliRunner().invoke(main, arguments).exit_code == 0
import disagg.serve.launch.main
assert "ray" not in sys.modules
sys.modules["ray"] = None
result = click.testing.CliRunner().invoke(main, ["serve", "--port", "0", "--cluster", "ray", *sys.argv[1:]])
assert result.exit_code == 2, result.output
assert "pip install 'disagg[ray]'" in result.output, result.output
"""


def test_ray_is_loaded_for_those_alone_who_ask_for_it(tiny_model) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tiny_model("llama"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("ray", "auto"),
        ("ray:auto", "auto"),
        ("ray://10.0.0.1", "10.0.0.1:6379"),
        ("ray://head:6380", "head:6380"),
    ],
)
def test_a_cluster_is_named_in_four_ways(said: str, address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'disagg[ray]')")
    from disagg.serve.launch.ray_connection import address_of

    assert address_of(said) == address


@pytest.mark.parametrize("said", ["slurm", "ray:", "ray://", "ray://:1", "ray:10.0.0.1", "rays://10.0.0.1:6379"])
def test_anything_else_is_no_cluster(said: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'disagg[ray]')")
    from disagg.serve.launch.ray_connection import address_of

    with pytest.raises(ConfigurationError, match="is no Ray cluster"):
        address_of(said)
