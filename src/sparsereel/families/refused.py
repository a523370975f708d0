"""Models of diffusers that stay as they are, and why. Every exported model is either here or in a family."""

from __future__ import annotations

_NO_GRID = "its tokens are not pixels of a picture or video"
_LINEAR = "its self-attention is linear attention, which has no score matrix to thin out"
_OWN_MASK = "it hands attention a mask of its own, a value for each query and key"
_MIXED = "text, pictures and other tokens are mixed in one sequence by index lists, so no fixed segment is the grid"
_OWN_BACKEND = "it names its attention backend itself, past the place where sparsereel enters"
_TEXT_KEYS = "the picture attends to itself and the prompt in one call, so queries are fewer than keys"
_UNVERIFIED = "its token order has not been checked yet"
_PART = "it is a part of other models, whose forward says where its tokens lie"

#: class name in diffusers: reason
REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": _NO_GRID,
    "AnyFlowFARTransformer3DModel": "it generates chunk by chunk with cached keys, so queries are fewer than keys",
    "BriaFibo2Transformer2DModel": _UNVERIFIED,
    "Cosmos3OmniTransformer": _MIXED,
    "DreamLiteTransformer2DModel": _PART,
    "DreamLiteUNetModel": _UNVERIFIED,
    "ErnieImageTransformer2DModel": _UNVERIFIED,
    "Flux3Transformer2DModel": _UNVERIFIED,
    "GlmImageTransformer2DModel": _UNVERIFIED,
    "HeliosTransformer3DModel": "history of several resolutions stands in the sequence with its own cached keys",
    "Ideogram4Transformer2DModel": _MIXED,
    "JoyImageEditPlusTransformer3DModel": _MIXED,
    "JoyImageEditTransformer3DModel": _UNVERIFIED,
    "Kandinsky3UNet": _UNVERIFIED,
    "Kandinsky6SRTransformer3DModel": _OWN_BACKEND,
    "Kandinsky6Transformer3DModel": _UNVERIFIED,
    "Krea2Transformer2DModel": _UNVERIFIED,
    "LongCatAudioDiTTransformer": _NO_GRID,
    "LuminaNextDiT2DModel": _UNVERIFIED,
    "MiniMaxH3Transformer3DModel": _MIXED,
    "MiniMaxMusic3RVQDepthDecoder": _NO_GRID,
    "MiniMaxMusic3Transformer1DModel": _NO_GRID,
    "MotionAdapter": _PART,
    "NucleusMoEImageTransformer2DModel": _TEXT_KEYS,
    "OmniGenTransformer2DModel": _OWN_MASK,
    "PRXTransformer2DModel": _TEXT_KEYS,
    "PriorTransformer": _NO_GRID,
    "QwenImage21Transformer2DModel": _OWN_BACKEND,
    "RFD4ProteinaTransformer": _NO_GRID,
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "it generates chunk by chunk with cached keys",
    "SanaWMTransformer3DModel": _LINEAR,
    "StableAudio3DiTModel": _NO_GRID,
    "StableAudioDiTModel": _NO_GRID,
    "StableCascadeUNet": _TEXT_KEYS,
    "T5FilmDecoder": _NO_GRID,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "UNet1DModel": _NO_GRID,
    "UNet2DModel": _UNVERIFIED,
    "UVit2DModel": _UNVERIFIED,
    "WanAnimate2Transformer3DModel": _OWN_BACKEND,
}
