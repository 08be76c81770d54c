"""Model configuration, the model, and reading and writing its weights."""

from tessera.models.config import GPTConfig, RopeScaling
from tessera.models.gpt import GPTModel

__all__ = ["GPTConfig", "GPTModel", "RopeScaling"]
