"""Every decision as a state machine: events and ``now`` in, actions out. No I/O, clock, randomness, tensors."""
