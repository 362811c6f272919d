"""Lightning callbacks."""

from pera_lightning.callbacks.adapter_injection import AdapterInjection

__all__ = ["AdapterInjection"]
