"""Placements: which instances on which devices serve a workload best within its objectives."""
