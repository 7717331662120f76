"""The form in which KV blocks travel follows what transfers took."""

import pytest

from disagg.costs.codec_choice import MIN_BYTES, CodecChoice
from disagg.costs.links import KvCodec, LinkModel

CODING_BYTES_PER_S = 5e9
RATIO = 0.53


def take(choice: CodecChoice, link: LinkModel, num_bytes: int) -> KvCodec:
    """One transfer over a link that is ideal but for the time that coding takes."""
    codec = choice.choose(num_bytes)
    raw_s = link.transfer_time_s(num_bytes)
    coded_s = link.transfer_time_s(RATIO * num_bytes) + num_bytes / CODING_BYTES_PER_S
    choice.observe(codec, num_bytes, raw_s if codec is KvCodec.RAW else coded_s)
    return codec


@pytest.mark.parametrize(
    ("bytes_per_s", "best"), [(125e6, KvCodec.INT8), (1e9, KvCodec.INT8), (4e9, KvCodec.RAW), (40e9, KvCodec.RAW)]
)
def test_the_quicker_form_is_chosen(bytes_per_s: float, best: KvCodec) -> None:
    choice, link = CodecChoice(), LinkModel(bytes_per_s, 1e-4)
    taken = [take(choice, link, (10 + n % 5) << 20) for n in range(40)]
    assert set(taken[:4]) == {KvCodec.RAW, KvCodec.INT8}  # both are measured first
    assert set(taken[4:]) == {best}


def test_a_link_that_changes_is_noticed() -> None:
    choice = CodecChoice()
    for _ in range(20):
        take(choice, LinkModel(10e9), 32 << 20)
    assert take(choice, LinkModel(125e6), 32 << 20) is KvCodec.RAW
    taken = [take(choice, LinkModel(125e6), 32 << 20) for _ in range(60)]
    assert taken[-1] is KvCodec.INT8


def test_little_is_sent_as_it_is() -> None:
    choice = CodecChoice()
    assert {take(choice, LinkModel(1e6), MIN_BYTES - 1) for _ in range(9)} == {KvCodec.RAW}
