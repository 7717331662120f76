"""Whatever happens to instances, no request fails and every answer is the undisturbed one; nothing is left held."""

import random
import sys
from dataclasses import replace

import pytest
from fault_campaign import SETTINGS, Campaign, Fault, audit, num_held_blocks, questions, resources, undisturbed
from server_process import serving
from test_lifecycle import wait_for

PLACEMENTS = {
    "1x1": ("--prefill", "1", "--decode", "1"),
    "2x2": ("--prefill", "2", "--decode", "2"),
    "mixed": ("--prefill", "1", "--decode", "1", "--colocated", "1"),
}
NUM_DISTINCT = 24
NUM_SHORT = 12


def test_a_short_campaign() -> None:
    """One of each but for a long freeze, which takes its time."""
    kinds = set(Fault) - {Fault.FREEZE}
    run_campaign("2x2", num_requests=NUM_SHORT, seed=1, pace_s=0.3, least_faults=len(kinds), kinds=kinds)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_campaign_of_a_thousand_requests(placement: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    row = run_campaign(placement, num_requests=1000, seed=seed, pace_s=1.5, least_faults=40, kinds=set(Fault))
    with capsys.disabled():
        sys.stdout.write(f"\n{row}\n")


@pytest.mark.slow
@pytest.mark.parametrize("link", ["shm", "tcp", "nixl"])
def test_ten_minutes_of_aborts_stops_and_kills_end_with_an_exact_audit(
    link: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if link == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install 'disagg[nixl]'")
    row = run_hand_over_campaign(link, 600.0)
    with capsys.disabled():
        sys.stdout.write(f"\n{row}\n")


def run_hand_over_campaign(link: str, seconds: float) -> str:
    """High load on one link, prompts in parts; a third of the clients leave, either side stops, or dies."""
    return run_campaign(
        "2x2",
        num_requests=100,
        seed=3,
        pace_s=2.0,
        least_faults=10,
        kinds={Fault.KILL, Fault.FREEZE, Fault.PAUSE},
        settings=("--kv-link", link, "--max-batch-tokens", "64"),
        longest=50,
        concurrency=16,
        leaving=0.33,
        least_s=seconds,
    )


def run_campaign(
    placement: str,
    *,
    num_requests: int,
    seed: int,
    pace_s: float,
    least_faults: int,
    kinds: set[Fault],
    settings: tuple[str, ...] = (),
    longest: int = 20,
    concurrency: int = 6,
    leaving: float = 0.1,
    least_s: float = 0.0,
) -> str:
    """Run one, of whose clients a part is ``leaving`` before the end; return its row of a table."""
    rng = random.Random(seed)
    distinct = questions(min(NUM_DISTINCT, num_requests), seed, longest)
    with serving(*PLACEMENTS[placement], *SETTINGS, *settings) as server:
        expected = undisturbed(server, distinct)
        num_files, num_bytes = resources(server)
        asked = [
            replace(rng.choice(distinct), leaves_after=rng.randint(1, 12) if rng.random() < leaving else None)
            for _ in range(num_requests)
        ]
        outcome = Campaign(server, seed, sorted(kinds, key=str), concurrency).run(
            asked, expected, pace_s=pace_s, least_faults=least_faults, least_s=least_s
        )
        assert outcome.wrong == [], server.text
        assert outcome.num_whole + outcome.num_left >= num_requests
        wait_for(lambda: num_held_blocks(server) == 0, "all KV blocks to come back")
        found = audit(server)
        assert found["is_exact"], found
        assert all(one["num_held"] == one["num_leases"] == 0 for one in found["instances"]), found
        wait_for(lambda: resources(server)[0] <= num_files + 16, "open files to be closed")
        assert resources(server)[1] < 1.5 * num_bytes
        assert kinds <= set(outcome.faults) or placement == "1x1"
        faults = ", ".join(f"{fault.name.lower()} {count}" for fault, count in sorted(outcome.faults.items(), key=str))
        resumed = server.metric("disagg:sequences_resumed_total")
        migrated = server.metric("disagg:sequences_migrated_total")
        return (
            f"| {placement} | {seed} | {outcome.num_whole} | {outcome.num_left} | {faults} | {resumed:.0f} "
            f"| {migrated:.0f} | {len(outcome.wrong)} |"
        )
