"""One definition of what is measured (TTFT, TPOT, ITL, attainment, goodput) and of workloads.

The live server, the simulator and every benchmark speak of latencies through the types of this room.
"""
