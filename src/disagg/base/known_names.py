"""What is said of a name that nobody knows: which names there are, and which one was perhaps meant."""

import difflib
from collections.abc import Iterable
from typing import Final

_MOST_LISTED: Final = 24


def known_names(name: str, known: Iterable[str]) -> str:
    """Return ``there are A, B, C; did you mean B?``, the question only where one of them is close to ``name``."""
    names = list(known)
    listed = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
    words = f"there {'is' if len(names) == 1 else 'are'} {listed}" if names else "there are none"
    by_lower = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"{words}; did you mean {by_lower[close[0]]}?" if close else words
