"""A placement as vLLM's start commands: an instance each, and a proxy for each unit."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.base.request import Role
from disagg.placement.layout import PlacedInstance

KV_TRANSFER: Final = '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'
"""With NIXL the proxy decides for each request who prefills and who decodes; the role is a placeholder."""
PROXY: Final = "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py"
"""In vLLM's repository."""
_FIRST_PORT: Final = 8100
_FIRST_SIDE_PORT: Final = 5600
_SIDE_PORTS: Final = 32
"""Between two instances: each worker of one takes its own."""


@dataclass(frozen=True)
class VllmInstance:
    """One instance with its address. ``nodes`` are in the order of its stages."""

    placed: PlacedInstance
    port: int
    side_port: int

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that it is on."""
        return tuple(dict.fromkeys(device.node for device in self.placed.place))

    @property
    def host(self) -> str:
        """Where it listens: the node of its first stage."""
        return self.nodes[0]


def vllm_instances(placed: Sequence[PlacedInstance]) -> list[VllmInstance]:
    """Return the instances with ports that no two of them share."""
    return [
        VllmInstance(one, _FIRST_PORT + number, _FIRST_SIDE_PORT + number * _SIDE_PORTS)
        for number, one in enumerate(placed)
    ]


def vllm_arguments(placed: PlacedInstance, model: str) -> list[str]:
    """Return what follows ``vllm serve`` but for the address."""
    choice = placed.choice
    arguments = [model, "--tensor-parallel-size", str(choice.tensor_parallel)]
    if choice.pipeline_parallel > 1:
        arguments += ["--pipeline-parallel-size", str(choice.pipeline_parallel)]
    if choice.batching.max_batch_tokens is not None:
        arguments += ["--max-num-batched-tokens", str(choice.batching.max_batch_tokens)]
    if choice.batching.max_batch_size is not None:
        arguments += ["--max-num-seqs", str(choice.batching.max_batch_size)]
    if choice.role is not Role.COLOCATED:
        arguments += ["--kv-transfer-config", KV_TRANSFER]
    return arguments


def vllm_script(placed: Sequence[PlacedInstance], model: str) -> str:
    """Return the commands, to be run on the nodes that their comments name."""
    instances = vllm_instances(placed)
    lines = ["# vLLM, KV over NIXL. Each command runs on the node that is named above it."]
    for one in instances:
        lines += ["", *_command(one, model)]
    units = dict.fromkeys(one.placed.unit for one in instances if one.placed.choice.role is not Role.COLOCATED)
    for number, unit in enumerate(units):
        lines += ["", *_proxy([one for one in instances if one.placed.unit == unit], unit, 8000 + number)]
    return "\n".join(lines) + "\n"


def _command(one: VllmInstance, model: str) -> Iterator[str]:
    yield f"# on {one.host}: {one.placed.choice}" + (f", unit {one.placed.unit}" if one.placed.unit >= 0 else "")
    arguments = vllm_arguments(one.placed, model)
    if len(one.nodes) > 1:
        others = ", ".join(one.nodes[1:])
        yield f"# its pipeline goes on to {others}: first `ray start --head` here, and there"
        yield f"# `ray start --address={one.host}:6379`"
        arguments += ["--distributed-executor-backend", "ray"]
    else:
        devices = ",".join(str(device.index) for device in one.placed.place)
        yield f"CUDA_VISIBLE_DEVICES={devices} \\"
    if one.placed.choice.role is not Role.COLOCATED:
        yield f"VLLM_NIXL_SIDE_CHANNEL_HOST={one.host} VLLM_NIXL_SIDE_CHANNEL_PORT={one.side_port} \\"
    yield shlex.join(["vllm", "serve", *arguments, "--host", "0.0.0.0", "--port", str(one.port)])


def _proxy(instances: Sequence[VllmInstance], unit: int, port: int) -> Iterator[str]:
    """Yield the demonstration proxy of vLLM's own tests; a router such as llm-d's takes its place for good."""
    yield f"# unit {unit}: the proxy that sends prompts to prefill and goes on with decode, from vLLM's repository"
    arguments = ["python", PROXY, "--port", str(port)]
    for role, name in ((Role.PREFILL, "prefiller"), (Role.DECODE, "decoder")):
        ours = [one for one in instances if one.placed.choice.role is role]
        arguments += [f"--{name}-hosts", *(one.host for one in ours)]
        arguments += [f"--{name}-ports", *(str(one.port) for one in ours)]
    yield shlex.join(arguments)
