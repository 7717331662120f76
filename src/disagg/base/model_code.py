"""Who computes a model."""

import enum


class ModelCode(enum.Enum):
    """Whose code computes the layers of a model.

    ``NATIVE``: our decoder. ``TRANSFORMERS``: Hugging Face's modelling code over our paged KV cache, the slow path.
    ``AUTO``: ours, and theirs for an architecture that ours does not know.
    """

    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"
