"""KVzap (arXiv 2601.07891): KVzip+'s scores, told from hidden states by small gates."""

from .gates import KVzapGates
from .policy import KVzap
from .training import Trained, train_gates

__all__ = ["KVzap", "KVzapGates", "Trained", "train_gates"]
