"""Named protocols: prompts, decoding and the reading of answers as pure functions. Nothing here knows of adapters.

Importing this package registers all of them and loads no library beyond Python's own.
"""

from pera_lightning.evaluation import commonsense, dialogue, maths
from pera_lightning.evaluation.protocols import Decoding, Protocol, protocol, protocols, register
from pera_lightning.evaluation.rows import Row

__all__ = ["Decoding", "Protocol", "Row", "commonsense", "dialogue", "maths", "protocol", "protocols", "register"]
