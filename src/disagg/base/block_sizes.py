"""Which KV blocks of one size can be made of blocks of another size."""


def why_not_made(theirs: int, ours: int, *, has_windows: bool = False) -> str:
    """Return why blocks of ``ours`` tokens cannot be made of those of ``theirs``; an empty string where they can.

    ``has_windows`` where layers with a sliding window have blocks of their own, which lie by number behind the others.
    """
    if theirs == ours:
        return ""
    sizes = f"blocks of {theirs} and of {ours} tokens"
    if has_windows:
        return f"{sizes} of a model with sliding windows"
    least, most = sorted((theirs, ours))
    if most % least:
        return f"{sizes}: the larger must be a multiple of the smaller"
    return f"{sizes}: both must be even" if least % 2 else ""
