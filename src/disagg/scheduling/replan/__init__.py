"""Whether the workload has moved, which placements can be reached, and when a change to one pays."""
