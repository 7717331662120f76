"""What an instance of a test says of itself."""

from disagg.base.messages import InstanceFacts

FACTS = InstanceFacts(
    pid=1,
    device="cpu",
    kernel_backend="fake",
    num_blocks=10,
    block_size=16,
    max_model_len=100,
    vocab_size=9,
    weight_bytes=0,
    kv_bytes=0,
    load_s=0.0,
    pool=b"",
)
