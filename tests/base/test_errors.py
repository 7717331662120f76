import pytest

from disagg.base import errors


def all_errors(kind: type[errors.DisaggError]) -> list[type[errors.DisaggError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(errors.DisaggError))
def test_the_tree_in_the_docstring_is_the_tree_in_the_code(kind: type[errors.DisaggError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ContextLengthError("too long"), 400),
        (errors.ModelNotFoundError("no such model"), 404),
        (errors.OverloadedError("full"), 429),
        (errors.InstanceLostError("prefill-0 died"), 503),
        (errors.TransferError("lost"), 500),
    ],
)
def test_http_status_is_that_of_the_nearest_class(error: errors.DisaggError, status: int) -> None:
    assert errors.http_status(error) == status
