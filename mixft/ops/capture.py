"""The current stream of a device, and whether a CUDA graph captures it.

Every replay would repeat what is done in a capture, such as making state.
"""

import torch


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The current stream of ``device``, by its address: on another one what was made here may not be ready; 0 on a
    CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
