"""The HTTP API: OpenAI's endpoints over the router."""
