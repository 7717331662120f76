"""The HTTP API: OpenAI's endpoints over a router, and what an operator looks at."""
