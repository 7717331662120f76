"""What an instance is told of the cores of its host that instances lend each other."""

import msgspec


class LentCores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How instances of one host lend each other their cores."""

    board: str
    """File, shared by them, that says which cores have a step to compute."""
    cores: tuple[int, ...]
    """Those of others that this instance may borrow, the nearest first."""
