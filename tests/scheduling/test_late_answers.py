"""An answer that is handed over late is behind its schedule, and makes up for it: what its first gap took is known."""

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.base.objectives import Objectives
from disagg.base.sampling import FinishReason
from disagg.costs.latency import StepShape
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import AnyInstanceInput, Continue, CopyEnded, SequenceFacts, Start
from disagg.scheduling.instance.outputs import Emitted, StartCopy
from disagg.scheduling.step.actions import RunStep
from disagg.scheduling.step.events import StepDone, StepResult

TPOT_S = 0.05
BLOCK = 16
ANSWER, PROMPT = RequestId("answer"), RequestId("prompt")
NUM_PROMPT, NUM_OUTPUT = 31, 20


class LinearTimes:
    """Two milliseconds a step, 0.5 for each new token."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        return (0.002 + 0.0005 * shape.num_tokens,)


def facts(name: RequestId, num_tokens: int, num_output: int) -> SequenceFacts:
    return SequenceFacts(
        request_id=name, epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=num_tokens + num_output
    )


def offer(age_s: float, num_later_tokens: int) -> KvOffer:
    """Return what is offered of an answer whose first token came so long ago."""
    num_tokens = NUM_PROMPT + num_later_tokens
    return KvOffer(
        request_id=ANSWER,
        epoch=Epoch(0),
        source=InstanceId("prefill-0"),
        incarnation="1",
        num_tokens=num_tokens,
        block_size=BLOCK,
        block_ids=tuple(map(BlockId, range(-(-num_tokens // BLOCK)))),
        lease_s=60.0,
        pool=b"",
        answer_age_s=age_s,
        num_later_tokens=num_later_tokens,
    )


class Instance:
    """It computes a prompt of 8,000 tokens without end when an answer is handed over to it, in the first step."""

    def __init__(self) -> None:
        self.core = InstanceCore(
            InstanceHeader(
                instance=InstanceId("decode-0"),
                settings=SchedulerSettings(
                    scheduling=SchedulingMode.SLACK, objectives=Objectives(tpot_s=TPOT_S), max_batch_tokens=100
                ),
                num_blocks=1000,
                block_size=BLOCK,
                latency=LinearTimes(),
            )
        )
        self.now = 0.0
        self.step: RunStep | None = None
        self.token_times: list[float] = []
        self._copies: list[AnyInstanceInput] = []
        self.handle(Start(sequence=facts(PROMPT, 8000, 2)))

    def handle(self, *inputs: AnyInstanceInput) -> None:
        for output in self.core.handle(inputs, self.now):
            if isinstance(output, RunStep):
                self.step = output
            elif isinstance(output, StartCopy):
                ended = CopyEnded(
                    request_id=ANSWER, epoch=Epoch(0), num_bytes=1, started_s=self.now, ended_s=self.now + 1e-3
                )
                self._copies.append(ended)
            elif isinstance(output, Emitted) and ANSWER in output.request_ids:
                self.token_times.append(self.now)
        self.core.validate()

    def end_step(self, *inputs: AnyInstanceInput, num_left: int) -> None:
        """End the step, in which ``inputs`` came; the answer ends when it has ``num_left`` tokens from here."""
        assert self.step is not None
        duration_s = LinearTimes().stage_times_s(StepShape.of(self.step.chunks))[0]
        self.now += duration_s
        end = FinishReason.LENGTH if len(self.token_times) + 1 == num_left else None
        results = tuple(
            StepResult(one.request_id, end if one.request_id == ANSWER else None)
            for one in self.step.chunks
            if one.samples
        )
        done = StepDone(step_id=self.step.step_id, results=results, duration_s=duration_s)
        copies, self._copies = self._copies, []
        self.handle(done, *copies, *inputs)


def tpot_s(*, age_s: float, num_later_tokens: int = 0) -> float:
    """Return the mean gap of an answer that comes just before a step of the prompt ends, from its first token on."""
    instance = Instance()
    num_known = NUM_PROMPT + 1 + num_later_tokens
    num_left = NUM_OUTPUT - num_later_tokens - 1
    message = Continue(sequence=facts(ANSWER, num_known, num_left), offer=offer(age_s, num_later_tokens))
    instance.end_step(message, num_left=num_left)
    first_s = instance.now - age_s
    while len(instance.token_times) < num_left:
        instance.end_step(num_left=num_left)
    return (instance.token_times[-1] - first_s) / (NUM_OUTPUT - 1)


def test_an_answer_makes_up_for_a_hand_over_that_took_several_of_its_gaps() -> None:
    assert tpot_s(age_s=3 * TPOT_S) <= TPOT_S


def test_tokens_from_elsewhere_count_as_well() -> None:
    assert 0.9 * TPOT_S <= tpot_s(age_s=8 * TPOT_S, num_later_tokens=8) <= TPOT_S


def test_an_answer_that_is_far_behind_gets_more_time_but_not_all() -> None:
    # Prompts go on beside it, at a pace at which it catches up.
    assert 0.7 * TPOT_S <= (tpot_s(age_s=100 * TPOT_S) * (NUM_OUTPUT - 1) - 100 * TPOT_S) / (NUM_OUTPUT - 1) < TPOT_S


def test_what_came_during_a_step_has_waited_for_it() -> None:
    # Told to be new, it may have been there since the step began that ended just now.
    instance = Instance()
    message = Continue(sequence=facts(ANSWER, NUM_PROMPT + 1, 5), offer=offer(0.0, 0))
    instance.end_step(message, num_left=5)
    while len(instance.token_times) < 2:
        instance.end_step(num_left=5)
    first_s, second_s = instance.token_times
    assert second_s - first_s <= 0.75 * TPOT_S + 1e-9
