"""Moving KV blocks between instances: shared pools, links that read a peer's pool, transfers with terminal states."""
