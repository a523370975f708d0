"""ViCLIP (Wang et al., InternVid, ICLR 2024): CLIP's two towers, the picture tower taking a whole clip, with the
parameter names of the published ViClip-InternVid-10M-FLT.pth.

Every frame is cut into patches; all patches of all frames, with a place in the picture and one in time, and one class
token attend to each other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

FRAMES = 8
WORDS = 32  # tokens of a text


class ViClip(nn.Module):
    """Clips and texts to vectors whose cosine says how well they fit. The defaults are the published ViT-L/14."""

    def __init__(
        self,
        *,
        side: int = 224,
        patch: int = 14,
        width: int = 1024,
        layers: int = 24,
        text_width: int = 768,
        text_layers: int = 12,
        length: int = 768,
        vocabulary: int = 49408,
    ):
        super().__init__()
        self.vision_encoder = _Vision(side, patch, width, layers, length)
        self.text_encoder = _Text(text_width, text_layers, length, vocabulary)
        self.temp = nn.Parameter(torch.tensor(0.01))  # of the training loss; here only to fit the file

    def encode_video(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips (N, F, 3, S, S), normalised, F = 8 or 1, to (N, D)."""
        found: torch.Tensor = self.vision_encoder(clips.transpose(1, 2))
        return found

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N, up to 32) of CLIP's tokenizer to (N, D); the end of the text has the largest number."""
        found: torch.Tensor = self.text_encoder(tokens)
        return found


class _Vision(nn.Module):
    def __init__(self, side: int, patch: int, width: int, layers: int, length: int):
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, FRAMES, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, layers)
        self.proj = nn.Parameter(torch.zeros(width, length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(3).permute(0, 3, 2, 1)  # (N, places, F, width)
        times = self.temporal_positional_embedding
        x = x + self.positional_embedding[1:, None] + (times if x.shape[2] > 1 else times.mean(1, keepdim=True))
        first = (self.class_embedding + self.positional_embedding[0]).expand(x.shape[0], 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, x.flatten(1, 2)], 1)))
        return self.ln_post(x[:, 0]) @ self.proj


class _Text(nn.Module):
    def __init__(self, width: int, layers: int, length: int, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(WORDS, width))
        self.transformer = _Transformer(width, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        future = torch.ones(count, count, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[:count], future)
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]
        return self.ln_final(ends) @ self.text_projection


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, hidden)
        return x


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        steps = {"c_fc": nn.Linear(width, 4 * width), "gelu": _QuickGelu(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(steps))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        return x + self.mlp(self.ln_2(x))


class _QuickGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def tokenizer() -> Callable[[str], torch.Tensor]:
    """A text to its tokens (1, 32): CLIP's tokenizer, longer texts cut before their end mark."""
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-L-14", context_length=WORDS)
    return lambda text: tokens([text])
