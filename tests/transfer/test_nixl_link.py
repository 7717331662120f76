"""What is special to NIXL: reads that cannot be stopped, and agents that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.base.errors import ConfigurationError
from disagg.transfer.nixl_agent import load_nixl


@pytest.mark.parametrize(("fate", "blocks"), [("wakes", "written late"), ("dies", "never written")])
def test_a_read_from_a_frozen_peer_is_given_up_and_ends_when_the_peer_wakes_or_dies(fate: str, blocks: str) -> None:
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install 'disagg[nixl]'")
    script = Path(__file__).with_name("nixl_frozen_peer.py")
    ended = subprocess.run(
        [sys.executable, str(script), fate],
        env={**os.environ, "UCX_TLS": "tcp"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    hung = "NIXL did not complete the read in time, and may still write its blocks"
    told = ended.stdout.splitlines()
    assert told[:4] == ["done", "hung", hung, "failed"]
    assert told[4:] in ([blocks], [] if fate == "wakes" else [blocks])


def test_without_nixl_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'disagg\[nixl\]'"):
        load_nixl()
