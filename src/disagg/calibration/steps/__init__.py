"""Timing the steps of a live instance: its real loop, scheduler, messages, executor and pulls, on a scripted load."""
