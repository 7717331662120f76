"""What a step, a transfer and a host cost: data and pure functions that policies, simulator and planner share."""
