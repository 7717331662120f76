"""Steps sized by slack, and the orders of the queue: what is predicted is what happens here, unless said."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.config import MAX_OVERTAKE_S, QueueOrder, SchedulerSettings, SchedulingMode
from disagg.base.ids import Epoch, RequestId
from disagg.base.objectives import Objectives
from disagg.base.sampling import FinishReason
from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.actions import AnyAction, Emit, RunStep
from disagg.scheduling.step.events import Arrived, StepDone, StepResult
from disagg.scheduling.step.scheduler import StepScheduler
from disagg.scheduling.step.slack import MIN_CHUNK, MOST_GAP

TPOT_S = 0.05


class LinearTimes:
    """Two milliseconds a step, 0.5 for each new token."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        return (0.002 + 0.0005 * shape.num_tokens,)


@dataclass
class Job:
    arrival_s: float
    num_prompt: int
    num_output: int
    priority: int = 0
    objectives: Objectives = field(default_factory=Objectives)
    token_times: list[float] = field(default_factory=list)


def serve(jobs: Sequence[Job], num_blocks: int = 1000, *, learns: bool = False, **chosen: object) -> list[RunStep]:
    """Run all jobs on one scheduler, whose steps take what ``LinearTimes`` say; return the steps."""
    its = SchedulerSettings(**{"scheduling": SchedulingMode.SLACK, **chosen})  # type: ignore[arg-type]
    latency = LinearTimes()
    scheduler = StepScheduler(its, num_blocks, 16, times=StepTimes(None if learns else latency))
    names = {RequestId(f"r{number}"): job for number, job in enumerate(jobs)}
    coming = sorted(names, key=lambda name: names[name].arrival_s)
    now, steps = 0.0, []
    running: tuple[float, RunStep] | None = None
    while coming or running is not None:
        now = max(now, names[coming[0]].arrival_s) if running is None else running[0]
        events: list[Arrived | StepDone] = []
        if running is not None:
            step = running[1]
            results = tuple(_sampled(names, chunk.request_id) for chunk in step.chunks if chunk.samples)
            duration_s = latency.stage_times_s(StepShape.of(step.chunks))[0]
            events.append(StepDone(step_id=step.step_id, results=results, duration_s=duration_s))
        while coming and names[coming[0]].arrival_s <= now:
            name = coming.pop(0)
            job = names[name]
            events.append(
                Arrived(
                    request_id=name,
                    epoch=Epoch(1),
                    num_tokens=job.num_prompt,
                    max_total_tokens=job.num_prompt + job.num_output,
                    priority=job.priority,
                    arrival_s=job.arrival_s,
                    objectives=job.objectives,
                )
            )
        running = _carry_out(scheduler.handle(events, now), now, names, steps)
        scheduler.validate()
        assert len(steps) < 20_000, "the jobs never end"
    audit = scheduler.audit()
    assert audit.free + audit.cached == audit.total
    return steps


def _sampled(names: dict[RequestId, Job], name: RequestId) -> StepResult:
    is_last = len(names[name].token_times) + 1 == names[name].num_output
    return StepResult(name, FinishReason.LENGTH if is_last else None)


def _carry_out(
    actions: Sequence[AnyAction], now: float, names: dict[RequestId, Job], steps: list[RunStep]
) -> tuple[float, RunStep] | None:
    running = None
    for action in actions:
        if isinstance(action, RunStep):
            steps.append(action)
            running = now + LinearTimes().stage_times_s(StepShape.of(action.chunks))[0], action
        elif isinstance(action, Emit):
            for name in action.request_ids:
                names[name].token_times.append(now)
    return running


def gaps(job: Job) -> list[float]:
    return [after - before for before, after in zip(job.token_times, job.token_times[1:], strict=False)]


def first_tokens(jobs: Sequence[Job]) -> list[int]:
    return sorted(range(len(jobs)), key=lambda number: jobs[number].token_times[0])


class TestSizes:
    def test_a_prompt_is_cut_to_what_fits_between_two_tokens_of_a_running_answer(self) -> None:
        answer, prompt = Job(0.0, 20, 200), Job(0.1, 2000, 2)
        steps = serve([answer, prompt], objectives=Objectives(tpot_s=TPOT_S))
        sizes = [chunk.num_tokens for step in steps for chunk in step.chunks if chunk.request_id == "r1"]
        assert max(sizes) > MIN_CHUNK
        assert max(gaps(answer)) <= MOST_GAP * TPOT_S + 1e-9
        assert (answer.token_times[-1] - answer.token_times[0]) / 199 <= TPOT_S

    def test_an_answer_ahead_of_its_schedule_lends_up_to_twice_its_objective(self) -> None:
        ahead, prompt = Job(0.0, 20, 200), Job(0.5, 2000, 2)
        serve([ahead, prompt], objectives=Objectives(tpot_s=TPOT_S))
        assert max(gaps(ahead)) > 1.1 * TPOT_S

    def test_without_an_objective_it_is_as_chunked(self) -> None:
        jobs = [[Job(0.0, 20, 200), Job(0.1, 2000, 2)] for _ in range(2)]
        same = [
            serve(one, scheduling=mode)
            for one, mode in zip(jobs, (SchedulingMode.SLACK, SchedulingMode.CHUNKED), strict=True)
        ]
        assert same[0] == same[1]

    def test_a_lone_prompt_is_cut_as_by_chunked_whatever_was_learned(self) -> None:
        # What is learned of equal steps says nothing of smaller ones: they had looked as quick, and were not.
        for learns in (True, False):
            prompt = Job(0.0, 5000, 2)
            steps = serve([prompt], learns=learns, objectives=Objectives(ttft_s=1.0, tpot_s=TPOT_S))
            assert [chunk.num_tokens for step in steps[:9] for chunk in step.chunks] == [512] * 9

    def test_a_second_prompt_joins_the_first_of_a_step_up_to_full_speed(self) -> None:
        # By these times a step of 128 is as fast, to 5%, as the largest.
        steps = serve([Job(0.0, 100, 1), Job(0.0, 400, 1)], objectives=Objectives(tpot_s=TPOT_S))
        assert [[chunk.num_tokens for chunk in step.chunks] for step in steps] == [[100, 28], [372]]

    def test_a_request_brings_its_own_objective(self) -> None:
        strict = Job(0.0, 20, 200, objectives=Objectives(tpot_s=0.02))
        serve([strict, Job(0.1, 2000, 2)], objectives=Objectives(tpot_s=1.0))
        assert max(gaps(strict)) <= MOST_GAP * 0.02 + 1e-9

    def test_where_the_smallest_chunk_is_a_long_gap_prompts_get_what_answers_have_saved(self) -> None:
        # 16 tokens take longer than two objectives of 5 ms, of which the answer needs a half.
        answer, prompt = Job(0.0, 20, 400), Job(0.1, 320, 2)
        serve([answer, prompt], objectives=Objectives(tpot_s=0.005))
        alone_s = 320 / MIN_CHUNK * (0.002 + 0.0005 * (MIN_CHUNK + 1))
        assert prompt.token_times[0] - prompt.arrival_s <= 2.5 * alone_s
        assert (answer.token_times[-1] - answer.token_times[0]) / 399 <= 0.005

    def test_a_prompt_goes_on_where_no_objective_can_be_kept(self) -> None:
        answer, prompt = Job(0.0, 20, 3000), Job(0.1, 400, 2)
        steps = serve([answer, prompt], objectives=Objectives(tpot_s=0.001))
        sizes = [chunk.num_tokens for step in steps for chunk in step.chunks if chunk.request_id == "r1"]
        assert all(size >= MIN_CHUNK for size in sizes[:-2])


job = st.builds(
    Job,
    arrival_s=st.floats(0, 3),
    num_prompt=st.integers(1, 900),
    num_output=st.integers(1, 40),
    priority=st.integers(0, 1),
    objectives=st.builds(Objectives, tpot_s=st.sampled_from([None, 0.03, 0.1])),
)


@given(
    jobs=st.lists(job, min_size=1, max_size=12),
    num_blocks=st.sampled_from([64, 1000]),
    learns=st.booleans(),
    queue=st.sampled_from(QueueOrder),
)
@settings(max_examples=80, deadline=None)
def test_everybody_is_served_and_no_planned_gap_is_too_long(
    jobs: list[Job], num_blocks: int, learns: bool, queue: QueueOrder
) -> None:
    steps = serve(jobs, num_blocks, learns=learns, queue=queue, objectives=Objectives(ttft_s=0.5, tpot_s=TPOT_S))
    assert [len(one.token_times) for one in jobs] == [one.num_output for one in jobs]
    for step in steps:
        prefills = [chunk.num_tokens for chunk in step.chunks if chunk.num_tokens > 1]
        decoding = {chunk.request_id for chunk in step.chunks if chunk.num_tokens == 1}
        # With the smallest chunk and everybody's token the step takes what it must.
        if learns or not decoding or (len(prefills) == 1 and prefills[0] <= MIN_CHUNK):
            continue
        tightest = min(jobs[int(name[1:])].objectives.tpot_s or TPOT_S for name in decoding)
        if prefills and all(jobs[int(name[1:])].token_times for name in decoding):
            answering = [name for name in decoding if _has_begun(steps, step, name)]
            if answering:
                tightest = min(jobs[int(name[1:])].objectives.tpot_s or TPOT_S for name in answering)
                duration_s = LinearTimes().stage_times_s(StepShape.of(step.chunks))[0]
                assert duration_s <= MOST_GAP * tightest + 1e-9


def _has_begun(steps: Sequence[RunStep], step: RunStep, name: str) -> bool:
    """Return whether a step before this one brought a token of the sequence."""
    earlier = steps[: steps.index(step)]
    return any(chunk.samples for one in earlier for chunk in one.chunks if chunk.request_id == name)


class TestQueue:
    """One at a time, all there when the first ends."""

    @pytest.mark.parametrize(
        ("queue", "order"),
        [
            (QueueOrder.PRIORITY, [0, 3, 1, 2]),
            (QueueOrder.FCFS, [0, 1, 2, 3]),
            (QueueOrder.SJF, [0, 3, 2, 1]),
            (QueueOrder.EDF, [0, 3, 2, 1]),
        ],
    )
    def test_the_order(self, queue: QueueOrder, order: list[int]) -> None:
        jobs = [
            Job(0.0, 300, 1, priority=-5),
            Job(0.01, 400, 1, objectives=Objectives(ttft_s=9.0)),
            Job(0.02, 100, 1, objectives=Objectives(ttft_s=1.0)),
            Job(0.03, 500, 1, priority=-1),
        ]
        serve(jobs, queue=queue, max_batch_size=1)
        assert first_tokens(jobs) == order

    def test_the_first_due_comes_first_where_there_is_an_objective(self) -> None:
        jobs = [Job(0.0, 300, 1), Job(0.01, 100, 1), Job(0.02, 100, 1, objectives=Objectives(ttft_s=0.1))]
        serve(jobs, max_batch_size=1, objectives=Objectives(ttft_s=3.0))
        assert first_tokens(jobs) == [0, 2, 1]

    @pytest.mark.parametrize("queue", [QueueOrder.SJF, QueueOrder.EDF])
    def test_a_flood_of_urgent_short_ones_does_not_starve_a_long_one(self, queue: QueueOrder) -> None:
        long = Job(0.0, 8000, 1, objectives=Objectives(ttft_s=1000.0))
        flood = [Job(0.04 * number, 120, 1, objectives=Objectives(ttft_s=0.1)) for number in range(1300)]
        serve([flood[0], long, *flood[1:]], queue=queue, max_batch_size=1)
        assert long.token_times[0] <= MAX_OVERTAKE_S * 2.5
