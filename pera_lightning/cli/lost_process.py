"""One line for the errors by which a process learns that another one of its run has ended, or does not answer."""

from __future__ import annotations

import re

import torch.distributed as dist

from pera_lightning.errors import shorten

# What gloo and NCCL say, in errors of kinds that mean other things as well.
_ENDED = re.compile(r"connection (was )?(closed|reset|likely closed)|broken pipe|remote process exit", re.I)
_SILENT = re.compile(r"timed? ?out", re.I)


def lost_process(error: BaseException) -> str | None:
    """Words an error of gloo, NCCL or torch's store that another process is the cause of; None for any other error."""
    text = shorten(str(error))
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo/transport" in text):
        return None
    if _SILENT.search(text):
        what = "another process of this run did not answer in time: it is stuck, or slower than the strategy's timeout"
    elif _ENDED.search(text):
        what = (
            "another process of this run has ended: see its own error above, or in the log of its node; one that was "
            "killed (memory?) leaves none"
        )
    else:
        return None
    return f"{what} ({text[:160]})"  # their messages go on with addresses and frames
