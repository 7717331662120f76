"""The other ends of a router under test: instances that say what a test makes them say, over real sockets."""

import asyncio
from typing import Any, TypeVar

import zmq
import zmq.asyncio
from fake_instance import facts

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.base.messages import (
    KvOffer,
    Offered,
    Pulled,
    Ready,
    SequenceOutput,
    StageStamps,
    StepOutput,
    ToEngine,
    decode_for_engine,
    encode,
)
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import FinishReason, SamplingParams

DEADLINE_S = 20.0
M = TypeVar("M")


def make_request(name: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 10, **fields: Any):
    return GenerationRequest(
        request_id=RequestId(name),
        epoch=Epoch(0),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=7),
        **fields,
    )


class ScriptedPeer:
    """One instance, played by the test."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, name: str, incarnation: str = "1") -> None:
        self.instance = InstanceId(name)
        self.role = Role(name.split("-")[0])
        self.incarnation = incarnation
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    async def say(self, message: Message) -> None:
        await self.say_bytes(encode(message))

    async def say_bytes(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    async def get_ready(self, version: int = PROTOCOL_VERSION, max_model_len: int = 512) -> None:
        await self.say(
            Ready(
                version=version,
                instance=self.instance,
                incarnation=self.incarnation,
                role=self.role,
                facts=facts(max_model_len=max_model_len),
            )
        )

    async def expect(self, kind: type[M]) -> M:
        """Return the next message, which must be of this kind."""
        message = await self.hear()
        assert isinstance(message, kind), message
        return message

    async def hear(self) -> ToEngine:
        async with asyncio.timeout(DEADLINE_S):
            return decode_for_engine(await self._socket.recv())

    async def emit(
        self,
        request: GenerationRequest,
        *token_ids: int,
        finished: FinishReason | None = None,
        stamps: StageStamps | None = None,
        epoch: int = 0,
    ) -> None:
        output = SequenceOutput(
            request_id=request.request_id,
            epoch=Epoch(epoch),
            token_ids=token_ids,
            finish_reason=finished,
            stamps=stamps,
        )
        await self.say(StepOutput(outputs=(output,)))

    async def offer(self, request: GenerationRequest, incarnation: str | None = None) -> KvOffer:
        offer = KvOffer(
            request_id=request.request_id,
            epoch=request.epoch,
            source=self.instance,
            incarnation=incarnation or self.incarnation,
            num_tokens=len(request.prompt_token_ids),
            block_size=16,
            block_ids=(),
            lease_s=60.0,
            pool=b"where the blocks are",
        )
        await self.say(Offered(offer=offer))
        return offer

    async def pulled(self, request: GenerationRequest, source: "ScriptedPeer", failure: str = "") -> None:
        await self.say(
            Pulled(
                request_id=request.request_id,
                epoch=request.epoch,
                source=source.instance,
                num_bytes=0 if failure else 4096,
                duration_s=0.5,
                failure=failure,
            )
        )

    def close(self) -> None:
        self._socket.close()
