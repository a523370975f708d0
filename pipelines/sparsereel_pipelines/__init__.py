"""Ready-made diffusers pipelines on top of the library, for Wan and what is built like it.

    from sparsereel_pipelines import StreamingVideoPipeline
    pipe = StreamingVideoPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)

Each is one file that diffusers can also load by its path (`custom_pipeline="...", trust_remote_code=True`), and each
takes the parts of a pipeline that is loaded already (`from_pipe`). The classes are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "HighResolutionPipeline": "high_resolution",
    "SparseVideoPipeline": "sparse_video",
    "StreamingVideoPipeline": "streaming_video",
}

__all__ = ["HighResolutionPipeline", "SparseVideoPipeline", "StreamingVideoPipeline"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sparsereel_pipelines.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
