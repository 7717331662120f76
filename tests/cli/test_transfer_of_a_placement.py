"""Who says in which form KV blocks travel: a flag, else the placement, else nobody."""

import pytest
from click import command, echo
from click.testing import CliRunner

from disagg.base.config import InstanceGroup, Placement
from disagg.base.request import Role
from disagg.base.transfer_settings import KvTransferDtype, TransferSettings
from disagg.cli.flags import flags_of
from disagg.cli.placement_file import choose_transfer


@pytest.mark.parametrize(
    ("flags", "written", "chosen"),
    [
        ([], None, "raw"),
        ([], KvTransferDtype.INT8, "int8"),
        (["--kv-transfer-dtype", "raw"], KvTransferDtype.INT8, "raw"),
        (["--kv-transfer-dtype", "auto"], None, "auto"),
    ],
)
def test_a_flag_goes_before_the_placement(flags: list[str], written: KvTransferDtype | None, chosen: str) -> None:
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=1),), kv_transfer_dtype=written)

    @command()
    @flags_of(TransferSettings)
    def show(**values: object) -> None:
        echo(choose_transfer(values, placement).kv_transfer_dtype.value)

    assert CliRunner().invoke(show, flags).stdout.strip() == chosen
