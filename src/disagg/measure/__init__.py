"""Measuring: workloads and arrivals, the request timeline, one definition of TTFT, TPOT, ITL and goodput."""
