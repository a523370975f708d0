"""What one call of a pipeline knows of its prompts: their embeddings, which tokens are words, and the regional ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsereel.extend.screening import PromptMap, mass_in_windows, screened, share_of_largest

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension
    from sparsereel.extend.regional import RegionalPrior
    from sparsereel.extend.sizes import Triple
    from sparsereel.extend.views import Place, Shares

#: arguments of `encode_prompt` that say what is encoded, in any pipeline
_OF_A_PROMPT = ("prompt", "negative", "pooled")


class PromptedCall:
    """One call of a pipeline under a regional prior; it ends with the call.

    Attributes:
        collecting: the small result is being made, whose maps are kept.
        chart: those maps; None until there are any.
        regions: embeddings (1, tokens, width) of the regional prompts, in the prior's order.
    """

    def __init__(self, prior: RegionalPrior, pipe: Any, extension: Extension) -> None:
        self.prior = prior
        self.pipe = pipe
        self.extension = extension
        self.collecting = False
        self.chart: PromptMap | None = None
        self.regions: list[Tensor] = []
        self._prompt: Tensor | None = None
        self._negative: Tensor | None = None
        self._kept: Tensor | None = None
        self._screened: tuple[tuple[Shares, ...], list[Tensor | None]] | None = None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the maps of what is made inside the block."""
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    # -------------------------------------------------------------- the pipeline's prompts

    def encoding(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt` that is listened to, and asked for the regional prompts beside."""
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self._prompt, self._negative = found[0], found[1]
            self._kept = self._kept_tokens(found[0], bound.arguments)
            if self.prior.prompts and not self.collecting:
                self.regions = [_encode(inner, bound, text) for text, _ in self.prior.prompts]
            return found

        return encode_prompt

    def _kept_tokens(self, prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
        """bool (samples, tokens): the first token, the end, and padding.

        Embeddings that end in zeros (Wan's) show where they end; others are told by the tokenizers. Where there is no
        text, the first and last token are all that can be known.
        """
        empty = prompt.eq(0).all(-1)
        kept = special_tokens(self.pipe, arguments, prompt.shape)
        if bool(empty.any()):
            kept = empty | empty.roll(-1, 1)
        elif kept is None:
            self.extension.tell(
                "prompts are given as embeddings, so their end and padding are not known: of their tokens the regional "
                "prior keeps the first and the last in every window, and judges the others by their map"
            )
            kept = torch.zeros_like(empty)
        kept = kept.to(empty.device).clone()
        kept[:, 0] = kept[:, -1] = True
        return kept

    def conditional(self, embeds: Tensor) -> list[slice] | None:
        """Rows of a model call that hold the user's prompts; None where that cannot be told.

        Args:
            embeds: what the model is called with, (rows, tokens, width): the samples, several times over where guidance
                is done in one batch.
        """
        if self._prompt is None or embeds.shape[1:] != self._prompt.shape[1:] or len(embeds) % len(self._prompt):
            return None
        size = len(self._prompt)
        starts = range(0, len(embeds), size)
        alike = [slice(s, s + size) for s in starts if _equal(embeds[s : s + size], self._prompt)]
        if self._negative is None or not _equal(self._negative, self._prompt):
            others = self._negative is not None and _equal(embeds[:size], self._negative)
            return alike if alike or others else None
        # Both branches have the same words. In one batch the prompt comes last.
        return alike[-1:] if len(starts) > 1 else None

    # -------------------------------------------------------------- the map, and what it says

    def keep_map(self, layer: Tensor, sides: Triple, whole: Triple) -> None:
        """Add a layer's map (samples, queries, tokens) over `sides`; all of them together are as large as `whole`."""
        if self.chart is None:
            self.chart = PromptMap(len(layer), whole, layer.shape[-1], layer.device)
        self.chart.add(layer, sides)

    def without(self, place: Place) -> Tensor | None:
        """bool (samples, tokens): what a window goes without; None where it is nothing."""
        if not self.prior.threshold:
            return None
        if self.chart is None:
            self.extension.tell(
                "the regional prior screens no tokens: no small result was made, or none of its layers had a map"
            )
            return None
        if self._screened is None or self._screened[0] != place.windows:
            self._screened = place.windows, self._screen(self.chart, place.windows)
        return self._screened[1][place.number]

    def _screen(self, chart: PromptMap, windows: tuple[Shares, ...]) -> list[Tensor | None]:
        """What each of the windows goes without."""
        assert self._kept is not None
        share = share_of_largest(mass_in_windows(chart.total, windows))
        out = screened(share, self.prior.threshold, self._kept.to(share.device))
        if not out.any():
            self.extension.tell(
                "the regional prior screens no tokens: the lowest share of one in a window is %.2f, the threshold %g",
                float(share.min()),
                self.prior.threshold,
            )
        return [each if each.any() else None for each in out]

    def regions_at(self, place: Place) -> list[Tensor]:
        """Embeddings (1, tokens, width) of the regional prompts of a window."""
        unmet = set(range(len(self.prior.prompts))).difference(*map(self.prior.for_window, place.windows))
        for number in sorted(unmet):
            text = self.prior.prompts[number][0]
            self.extension.tell(f"no window shares enough with the box of {text!r}: that regional prompt is not used")
        return [self.regions[number] for number in self.prior.for_window(place.windows[place.number])]


def check_pipeline(pipe: Any, prior: RegionalPrior) -> None:
    """Refuse a pipeline that encodes no prompts.

    Raises:
        ValueError: no `encode_prompt`; regional prompts without a text encoder.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"a regional prior needs a pipeline with encode_prompt, which {type(pipe).__name__} has not")
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    if prior.prompts and all(encoder is None for encoder in encoders):
        raise ValueError(f"regional prompts need a text encoder, and this {type(pipe).__name__} has none")


def special_tokens(pipe: Any, arguments: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """bool (samples, tokens): what the tokenizers put around the words of the prompts; None without a text.

    Args:
        arguments: of `encode_prompt`.
        shape: of its result.
    """
    found = None
    for suffix in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        texts = arguments.get(f"prompt{suffix}") or arguments.get("prompt")
        if tokenizer is None or texts is None or arguments.get("prompt_embeds") is not None:
            continue
        texts = [texts] if isinstance(texts, str) else list(texts)
        convert = getattr(pipe, "maybe_convert_prompt", None)
        if convert is not None:
            texts = [convert(text, tokenizer) for text in texts]
        options = {"padding": "max_length", "max_length": shape[1], "truncation": True}
        listed = tokenizer(texts, return_special_tokens_mask=True, **options)["special_tokens_mask"]
        special = torch.as_tensor(listed, dtype=torch.bool)
        found = special if found is None else found | special
    return None if found is None else found.repeat_interleave(shape[0] // len(found), 0)


def _encode(inner: Callable[..., Any], bound: inspect.BoundArguments, text: str) -> Tensor:
    """A text encoded as the call's prompt was, (1, tokens, width)."""
    arguments = dict(bound.arguments)
    for name in arguments:
        if name.startswith(_OF_A_PROMPT):
            arguments[name] = None
        elif name.startswith("num_") and name.endswith("_per_prompt"):
            arguments[name] = 1
    arguments |= {"prompt": text, "do_classifier_free_guidance": False}
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    found: Tensor = inner(**arguments)[0]
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether embeddings are the same, once they are of one type."""
    return a.shape == b.shape and torch.equal(a, b.to(a))
