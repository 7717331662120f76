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
    close = closest(name, names, 1)
    return f"{words}; did you mean {close[0]}?" if close else words


def closest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that are close to ``name``, whatever the case; the closest first."""
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=most)]
