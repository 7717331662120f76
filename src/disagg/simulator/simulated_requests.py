"""Requests of a workload as the simulator takes them: with names and the hashes of their KV blocks."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.ids import BlockHash, RequestId
from disagg.base.known_names import known_names
from disagg.base.service_classes import ServiceClass
from disagg.measure.workload import PrefixBlocks, RequestSpec
from disagg.simulator.request import SimulatedRequest

NO_CLASSES: Final[Mapping[str, ServiceClass]] = MappingProxyType({})
_NO_CLASS: Final = ServiceClass()


def simulated_requests(
    specs: Iterable[RequestSpec], name: str, block_size: int, classes: Mapping[str, ServiceClass] = NO_CLASSES
) -> Iterator[SimulatedRequest]:
    """Yield the requests; each is called after the workload and its line there, or its number where it has none.

    Where there are ``classes`` of service, requests have the terms of theirs. Raises ConfigurationError for a class
    that is none of them; without any, what requests are called says nothing.
    """
    for number, spec in enumerate(specs):
        own = _class_of(spec, name, classes)
        yield SimulatedRequest(
            request_id=RequestId(f"{name}:{spec.line}" if spec.line else f"{name}#{number}"),
            arrival_s=spec.arrival_s,
            prompt_len=spec.prompt_len,
            output_len=spec.output_len,
            block_hashes=block_hashes(spec.prefix, spec.prompt_len, block_size),
            hash_block_size=block_size,
            priority=own.priority,
            service_class=spec.service_class if classes else "",
            objectives=own.objectives,
        )


def _class_of(spec: RequestSpec, name: str, classes: Mapping[str, ServiceClass]) -> ServiceClass:
    if not classes or not spec.service_class:
        return _NO_CLASS
    own = classes.get(spec.service_class)
    if own is None:
        raise ConfigurationError(
            f"{name}, line {spec.line}: no class of service is called {spec.service_class!r}: "
            f"{known_names(spec.service_class, classes)}"
        )
    return own


def block_hashes(prefix: PrefixBlocks, prompt_len: int, block_size: int) -> tuple[BlockHash, ...]:
    """Return a name for each full KV block, equal where all ids up to it are equal."""
    if not prefix.ids:
        return ()
    chain = []
    digest = b""
    for block_id in prefix.ids:
        digest = _next(digest, block_id)
        chain.append(digest)
    num_blocks = min(prompt_len, len(chain) * prefix.block_tokens) // block_size
    return tuple(
        BlockHash(chain[((index + 1) * block_size - 1) // prefix.block_tokens] + index.to_bytes(4, "little"))
        for index in range(num_blocks)
    )


def _next(digest: bytes, block_id: int) -> bytes:
    return hashlib.blake2b(digest + block_id.to_bytes(8, "little"), digest_size=12).digest()
