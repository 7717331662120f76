"""What is looked for in an answer's text: calls of tools, and reasoning."""

import enum


class ToolCallParser(enum.Enum):
    """The form in which the model writes calls of tools; the names are vLLM's."""

    AUTO = "auto"
    """As the chat template says."""
    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"


class ReasoningParser(enum.Enum):
    """Whether what the model thinks is told from what it answers."""

    AUTO = "auto"
    """By the tags of the chat template."""
    NONE = "none"
