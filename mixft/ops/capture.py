"""Whether a CUDA graph is being captured: what is made then would be made anew by every replay."""

import torch


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
