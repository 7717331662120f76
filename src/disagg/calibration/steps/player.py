"""Playing one script to a live loop: which messages it gets when, and which of its turns count."""

import enum
from collections.abc import Sequence
from itertools import count
from typing import Final

from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.message_fields import Message
from disagg.base.messages import Abort, Adopt, Generate, KvOffer, Pulled, Ready, StepOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.calibration.steps.script import MeasuredStep, Script, ScriptResult, max_output

_EPOCH: Final = Epoch(1)
_SOURCE: Final = InstanceId("source")
_NEVER_S: Final = 1e12


class ScriptStage(enum.Enum):
    """How far a script has come."""

    ADOPTING = "adopting"
    DECODING = "decoding"
    PREFILLING = "prefilling"
    CLEARING = "clearing"
    DONE = "done"


class ScriptPlayer:
    """One script on one instance.

    The instance pulls the decodes' KV from its own pool: blocks with arbitrary contents, copied for real.
    """

    def __init__(self, script: Script, instance: Ready, numbers: "count[int]") -> None:
        self.script = script
        self.stage = ScriptStage.ADOPTING
        self._instance = instance
        self._numbers = numbers
        self._decodes: list[GenerationRequest] = []
        self._unfinished: set[RequestId] = set()
        self._num_pulled = 0
        self._is_stopping = False
        self._decode_steps: list[MeasuredStep] = []
        self._prefill_steps: list[MeasuredStep] = []

    def begin(self) -> list[Message]:
        """Return the first messages."""
        return self._adopt() if self.script.decode_contexts else self._send_prompts()

    def stop(self) -> None:
        """End an endless script at the next turn."""
        self._is_stopping = True

    @property
    def has_begun(self) -> bool:
        """True when the instance computes what the script is about."""
        return self.stage is not ScriptStage.ADOPTING

    def result(self) -> ScriptResult:
        """Return what was measured."""
        return ScriptResult(decode_steps=tuple(self._decode_steps), prefill_steps=tuple(self._prefill_steps))

    def after_turn(self, turn: MeasuredStep, news: Sequence[Message]) -> list[Message]:
        """Account for a turn of the loop, without chunks when it ran no step; return what is next.

        ``news`` is what the instance has said since the last turn.
        """
        for message in news:
            self._hear(message)
        match self.stage:
            case ScriptStage.ADOPTING:
                if self._num_pulled == len(self._decodes) and len(turn.chunks) == len(self._decodes):
                    self.stage = ScriptStage.DECODING
            case ScriptStage.DECODING:
                return self._after_decode(turn)
            case ScriptStage.PREFILLING:
                return self._after_prefill(turn)
            case ScriptStage.CLEARING:
                if not turn.chunks:
                    self.stage = ScriptStage.DONE
            case ScriptStage.DONE:
                pass
        return []

    def _after_decode(self, turn: MeasuredStep) -> list[Message]:
        if not self.script.is_endless:
            self._decode_steps.append(turn)
        if self._is_stopping:
            return self._clear()
        if self.script.is_endless and not turn.chunks and self._num_pulled == len(self._decodes):
            return self._adopt()  # they have reached their length
        if self.script.is_endless or len(self._decode_steps) < self.script.num_decode_steps:
            return []
        return self._send_prompts() if self.script.prompt_lens else self._clear()

    def _after_prefill(self, turn: MeasuredStep) -> list[Message]:
        if turn.chunks and not self.script.is_endless:
            self._prefill_steps.append(turn)
        if self._unfinished:
            return []
        return self._send_prompts() if self.script.is_endless and not self._is_stopping else self._clear()

    def _hear(self, message: Message) -> None:
        match message:
            case Pulled(failure=failure) if failure and self.stage in (ScriptStage.CLEARING, ScriptStage.DONE):
                pass  # ended with the rest, on its way
            case Pulled(failure=failure):
                assert not failure, f"the instance could not read its own pool: {failure}"
                self._num_pulled += 1
            case StepOutput(outputs=outputs):
                for output in outputs:
                    if output.finish_reason is not None:
                        self._unfinished.discard(output.request_id)

    def _adopt(self) -> list[Message]:
        self._num_pulled = 0
        self._decodes = [self._decode(context) for context in self.script.decode_contexts]
        return [Adopt(request=request, offer=self._offer(request)) for request in self._decodes]

    def _send_prompts(self) -> list[Message]:
        self.stage = ScriptStage.PREFILLING
        prompts = [self._request(length, max_tokens=1) for length in self.script.prompt_lens]
        self._unfinished = {request.request_id for request in prompts}
        return [Generate(request=request) for request in prompts]

    def _clear(self) -> list[Message]:
        self.stage = ScriptStage.CLEARING
        return [Abort(request_id=request.request_id, epoch=_EPOCH) for request in self._decodes]

    def _decode(self, context: int) -> GenerationRequest:
        return self._request(context, max_output(context, self._instance.facts.max_model_len), output_token_ids=(0,))

    def _request(self, length: int, max_tokens: int, output_token_ids: tuple[int, ...] = ()) -> GenerationRequest:
        number = next(self._numbers)
        vocab_size = self._instance.facts.vocab_size
        return GenerationRequest(
            request_id=RequestId(f"script-{number}"),
            epoch=_EPOCH,
            prompt_token_ids=tuple((number + 7919 * index) % vocab_size for index in range(length)),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=number, temperature=self.script.temperature, ignore_eos=True
            ),
            output_token_ids=output_token_ids,
        )

    def _offer(self, request: GenerationRequest) -> KvOffer:
        num_tokens = len(request.prompt_token_ids)
        facts = self._instance.facts
        num_blocks = -(-num_tokens // facts.block_size)
        if facts.window is not None:
            num_blocks += facts.window.num_beside(num_tokens, facts.block_size, 0, num_blocks)
        return KvOffer(
            request_id=request.request_id,
            epoch=request.epoch,
            source=_SOURCE,
            incarnation=self._instance.incarnation,
            num_tokens=num_tokens,
            block_size=facts.block_size,
            block_ids=tuple(BlockId(index) for index in range(num_blocks)),
            lease_s=_NEVER_S,
            pool=facts.pool,
        )
