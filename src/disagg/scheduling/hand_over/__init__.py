"""KV blocks on their way from one instance to another: leases on the one side, pulls on the other."""
