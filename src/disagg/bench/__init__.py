"""Load client, comparisons of systems, reports: measuring whatever speaks OpenAI's API."""
