"""Serving: the HTTP API, the router, the launcher of instances."""
