"""How models write tool calls and reasoning: told from the template, read as text comes, asked for by a grammar."""
