"""What fits: how long a sequence an instance holds, and how many tokens of one it must hold."""

from disagg.base.request import Role


def capacity_tokens(num_blocks: int, block_size: int, max_model_len: int | None = None) -> int:
    """Return the longest sequence, prompt plus answer in tokens, that an instance of this KV pool and limit holds."""
    pool = num_blocks * block_size
    return pool if max_model_len is None else min(pool, max_model_len)


def most_tokens(num_tokens: int, max_total_tokens: int, *, hand_over: bool) -> int:
    """Return how many tokens of a sequence an instance holds at most.

    One that hands it over after ``num_tokens`` known tokens never stores the next: another instance writes it.
    """
    return num_tokens if hand_over else max_total_tokens


def serves_requests(roles: set[Role]) -> bool:
    """Return whether instances of these roles together can serve a request from prompt to last token."""
    return Role.COLOCATED in roles or (Role.PREFILL in roles and Role.DECODE in roles)
