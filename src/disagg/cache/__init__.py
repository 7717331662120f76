"""KV bookkeeping without tensors: layouts, block states, leases, the prefix index."""
