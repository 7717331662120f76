"""Which method takes which type of event or message: a table in place of a ``match``, which asks class after class."""

from collections.abc import Callable, Mapping
from types import FunctionType, UnionType
from typing import Any, get_args, get_type_hints

from disagg.base.errors import InternalError


def by_type(whole: UnionType, owner: type, prefix: str) -> Mapping[type, Callable[..., Any]]:
    """Return the method of ``owner`` for each type of a union: of those whose names begin so, the one whose first
    parameter, ``self`` left out, is annotated with it.

    Raises InternalError unless each type is taken by exactly one of them, and nothing else is by any.
    """
    found: dict[type, Callable[..., Any]] = {}
    for name, method in vars(owner).items():
        if not (name.startswith(prefix) and isinstance(method, FunctionType)):
            continue
        for kind in _members(next(iter(get_type_hints(method).values()))):
            if kind in found:
                raise InternalError(f"{found[kind].__qualname__} and {method.__qualname__} both take {kind.__name__}")
            found[kind] = method
    if wrong := {*_members(whole)} ^ found.keys():
        names = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise InternalError(f"{owner.__name__}.{prefix}*: not taken, or not among what is to be: {names}")
    return found


def _members(annotation: Any) -> tuple[type, ...]:
    """Return the types of a union, or the only one."""
    return get_args(annotation) or (annotation,)
