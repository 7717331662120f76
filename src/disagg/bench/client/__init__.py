"""The load client: sends a workload to any server with OpenAI's API and records what came back, and when.

``run_load.run_load(LoadPlan, prompts)`` is the whole of it for a caller.
"""
