"""Protocols: everything that decides a result beside model and data, under one name that is written into the result.

`base` says what a protocol is and `prompts` holds the templates byte for byte; then one file a task: decoding, and how
an answer is read from a text. Whichever of them is imported, all are registered. They stand apart from the data
modules (`tasks/causal_lm/commonsense.py` …), which need torch: naming a protocol imports no library.
"""

from pera_lightning.tasks.causal_lm.protocols import commonsense, dialogue, maths
from pera_lightning.tasks.causal_lm.protocols.base import Decoding, Protocol, protocol, protocols, register

__all__ = ["Decoding", "Protocol", "commonsense", "dialogue", "maths", "protocol", "protocols", "register"]
