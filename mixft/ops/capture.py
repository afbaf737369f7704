"""Whether a CUDA graph is being captured: every replay would repeat what is done then, such as making state."""

import torch


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
