"""The mathematics of the adapters: pure functions, layers, and the methods that build them. Needs torch only.

What is imported here is public.
"""

from pera_lightning.adapters.adapted_layer import AdaptedConv1D, AdaptedLayer, AdaptedLinear
from pera_lightning.adapters.aurora import AuroRA, AuroRALayer
from pera_lightning.adapters.base import LayerContext, LinearAdapter, LowRankAdapter, LowRankUpdate
from pera_lightning.adapters.controls import FullFineTuning, LinearProbe
from pera_lightning.adapters.hilora import HiLoRA, HiLoRALayer
from pera_lightning.adapters.hira import HiRA, HiRALayer
from pera_lightning.adapters.lora import LoRA, LoRALayer
from pera_lightning.adapters.method import LinearMethod, LowRankMethod, Method, Target
from pera_lightning.adapters.moslora import MoSLoRA, MoSLoRALayer
from pera_lightning.adapters.pera import PERA, PERALayer
from pera_lightning.adapters.registry import method_class, method_from_spec, register_method, registered_methods
from pera_lightning.adapters.report import InjectionReport
