"""Which instance serves a sequence, and what the death of one means: the dispatcher."""
