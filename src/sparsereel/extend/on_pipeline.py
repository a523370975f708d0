"""What an extension changes around the model: the call of this one pipeline, and hooks on its VAE; undone by `restore`.

Everything here asks whether its model is still extended, so that a model restored alone is really itself. The call is
taken over by a subclass made on the fly, since Python looks a call up on the class; inside of it schedulers and
`prepare_latents` are shadowed for the length of that call only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsereel.extend.guide import Guide, enlarge, enlarge_pixels
from sparsereel.extend.noise import Antiphase, redraw
from sparsereel.extend.prompts import PromptedCall, check_pipeline
from sparsereel.extend.sizes import Triple
from sparsereel.inject import extension_of

if TYPE_CHECKING:
    from sparsereel.extend.extension import Extension

#: also read by `restore`
_ATTRIBUTE = "_sparsereel_extension"


class OnPipeline:
    """The handles of one pipeline."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.call: ExtendedCall | None = None

    def remove(self) -> None:
        """Put everything back, latest first."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()


def install(pipe: Any, models: dict[str, nn.Module], extensions: dict[str, Extension]) -> None:
    """Change a pipeline as the extensions of its models ask, which are of one recipe; on any error nothing is changed.

    Raises:
        ValueError: the recipe does not go with this pipeline.
    """
    held = OnPipeline()
    model, extension = next(iter(models.values())), next(iter(extensions.values()))
    recipe = extension.recipe
    try:
        vae = getattr(pipe, "vae", None)
        if recipe.statistics is not None and vae is not None:
            held.handles += recipe.statistics.install_vae(vae, extension, model)
        if recipe.regional is not None:
            check_pipeline(pipe, recipe.regional)
        if recipe.noise is not None or recipe.guide is not None or recipe.regional is not None:
            held.call = ExtendedCall(pipe, model, list(extensions.values()))
            held.handles.append(held.call)
    except BaseException:
        held.remove()
        raise
    if held.handles:
        setattr(pipe, _ATTRIBUTE, held)


def at_work(model: nn.Module, extension: Extension) -> bool:
    """Whether the model is still extended in this way."""
    return extension_of(model) is extension


class ExtendedCall:
    """Stands in for the call of one pipeline.

    Raises:
        ValueError: the pipeline's scheduler does not go with the recipe.
    """

    def __init__(self, pipe: Any, model: nn.Module, extensions: list[Extension]) -> None:
        extension = extensions[0]
        noise = extension.recipe.noise
        if isinstance(noise, Antiphase) and noise.apply_to != "init" and not _adds_noise(pipe.scheduler):
            raise ValueError(
                f"{type(pipe.scheduler).__name__} adds no noise between its steps, so antiphase noise has nothing to "
                "change there; take apply_to='init'"
            )
        self.pipe = pipe
        self.model = model
        self.extension = extension
        self.extensions = extensions
        self.original = type(pipe)
        self.inside = False
        pipe.__class__ = _called_through(self.original)

    def remove(self) -> None:
        """Give the pipeline its class back."""
        self.pipe.__class__ = self.original

    def run(self, plain: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline."""
        bound = inspect.signature(self.original.__call__).bind(self.pipe, *args, **kwargs)
        bound.apply_defaults()
        arguments = _by_name(bound)
        size = self._size(arguments)
        tokens = self.extension.sizes.scale.tokens(size)
        concerned = not self.inside and at_work(self.model, self.extension) and self.extension.concerns(tokens)
        if not concerned or arguments.get("latents") is not None:
            return plain(*args, **kwargs)
        guide = self.extension.recipe.guide
        self.inside = True
        try:
            with ExitStack() as stack:
                if self.extension.recipe.noise is not None:
                    stack.enter_context(self._redrawn())
                if self.extension.recipe.regional is not None:
                    stack.enter_context(self._prompted())
                if guide is not None and size[1:] != self.extension.sizes.trained[1:]:
                    stack.enter_context(self._guided(guide, plain, bound, size))
                return plain(*args, **kwargs)
        finally:
            self.inside = False

    def _size(self, arguments: dict[str, Any]) -> Triple:
        trained = self.extension.sizes.trained
        found = [
            arguments.get(name) or old for name, old in zip(("num_frames", "height", "width"), trained, strict=True)
        ]
        return found[0], found[1], found[2]

    # -------------------------------------------------------------- noise

    @contextmanager
    def _redrawn(self) -> Iterator[None]:
        noise, trained = self.extension.recipe.noise, self.extension.sizes.trained_tokens[0]
        assert noise is not None
        inner = self.pipe.prepare_latents
        signature = inspect.signature(inner)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            generator = signature.bind(*args, **kwargs).arguments.get("generator")
            return redraw(noise, inner(*args, **kwargs), trained, generator)

        with ExitStack() as stack:
            stack.enter_context(_shadowed(self.pipe, "prepare_latents", prepare))
            if isinstance(noise, Antiphase) and noise.apply_to != "init":
                stack.enter_context(_shadowed(self.pipe.scheduler, "step", _antiphase_step(self.pipe.scheduler, noise)))
            yield

    # -------------------------------------------------------------- prompts

    @contextmanager
    def _prompted(self) -> Iterator[None]:
        """Listen to what the pipeline encodes."""
        prior = self.extension.recipe.regional
        assert prior is not None
        call = PromptedCall(prior, self.pipe, self.extension)
        for extension in self.extensions:
            extension.prompted = call
        try:
            with _shadowed(self.pipe, "encode_prompt", call.encoding(self.pipe.encode_prompt)):
                yield
        finally:
            for extension in self.extensions:
                extension.prompted = None

    # -------------------------------------------------------------- guide

    @contextmanager
    def _guided(self, guide: Guide, plain: Callable[..., Any], bound: Any, size: Triple) -> Iterator[None]:
        """Make the small result, and those on the way; then lead the run in progress by the last of them."""
        prompted = self.extension.prompted
        with nullcontext() if prompted is None else prompted.collected():
            found = self._small(plain, bound, self.extension.sizes.trained[1:])
        for stage in range(1, guide.stages):
            share = stage / guide.stages
            sides = [
                self._nearest(old + (new - old) * share)
                for old, new in zip(self.extension.sizes.trained[1:], size[1:], strict=True)
            ]
            with self._stage((size[0], sides[0], sides[1])), self._led(guide, found, (sides[0], sides[1]), stage):
                found = self._small(plain, bound, (sides[0], sides[1]))
        with self._led(guide, found, size[1:], guide.stages):
            yield

    @contextmanager
    def _stage(self, size: Triple) -> Iterator[None]:
        """Models are extended at this size, too."""
        tokens = self.extension.sizes.scale.tokens(size)
        for extension in self.extensions:
            extension.stage = tokens
        try:
            yield
        finally:
            for extension in self.extensions:
                extension.stage = None

    def _nearest(self, side: float) -> int:
        scale = self.extension.sizes.scale
        unit = scale.pixels * scale.patch[1]
        return unit * max(1, round(side / unit))

    def _small(self, plain: Callable[..., Any], bound: Any, sides: tuple[int, int]) -> Tensor:
        """Latents of the same call with other sides."""
        if any(bound.arguments[name] for name in _of_kind(bound, inspect.Parameter.VAR_POSITIONAL)):
            raise ValueError("a pipeline whose pictures are led by a small one takes its arguments by name")
        arguments = {name: value for name, value in _by_name(bound).items() if value is not self.pipe}
        arguments |= {"height": sides[0], "width": sides[1], "output_type": "latent", "return_dict": False}
        for name in ("callback_on_step_end", "callback"):
            if name in arguments:
                arguments[name] = None
        return plain(**arguments)[0]

    @contextmanager
    def _led(self, guide: Guide, small: Tensor, sides: tuple[int, int], stage: int) -> Iterator[None]:
        pixels = self.extension.sizes.scale.pixels
        size = (sides[0] // pixels, sides[1] // pixels)
        vae = getattr(self.pipe, "vae", None)
        through = guide.through == "pixels" and vae is not None
        large = enlarge_pixels(vae, small, size) if through else enlarge(small, size)
        cell = (max(1, -(-size[0] // small.shape[-2])), max(1, -(-size[1] // small.shape[-1])))
        lead = _Lead(guide, large, self.pipe.scheduler, cell, stage)
        inner = self.pipe.prepare_latents

        def prepare(*args: Any, **kwargs: Any) -> Any:
            return lead.first(inner(*args, **kwargs))

        with (
            _shadowed(self.pipe, "prepare_latents", prepare),
            _shadowed(self.pipe.scheduler, "set_timesteps", lead.shortened(self.pipe.scheduler.set_timesteps)),
            _shadowed(self.pipe.scheduler, "step", lead.stepped(self.pipe.scheduler.step)),
        ):
            yield


class _Lead:
    """One run that an enlarged small result leads."""

    def __init__(self, guide: Guide, large: Tensor, scheduler: Any, cell: tuple[int, int], stage: int) -> None:
        self.guide = guide
        self.large = large
        self.scheduler = scheduler
        self.cell = cell
        self.step = 0
        # The same noise at every step, as DemoFusion keeps one noised trajectory.
        generator = torch.Generator().manual_seed(0x5EED + stage)
        self.noise = torch.randn(large.shape, generator=generator).to(large)

    def noised(self, step: int) -> Tensor:
        """The guide at the level of the latents that enter step number `step`."""
        when = self.scheduler.timesteps[step : step + 1]
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(self.large, when, self.noise)
        return self.scheduler.add_noise(self.large, self.noise, when)

    def first(self, latents: Any) -> Any:
        """What the run begins from."""
        if isinstance(latents, tuple):
            return (self.first(latents[0]), *latents[1:])
        if self.guide.mode == "start":
            return self.noised(0).to(latents)
        return self.guide.blend(latents, self.noised(0), 0, len(self.scheduler.timesteps), self.cell)

    def shortened(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """`set_timesteps` that leaves out the first steps."""

        @functools.wraps(inner)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            timesteps = self.scheduler.timesteps
            skip = self.guide.first_step(len(timesteps))
            if skip:
                self.scheduler.timesteps = timesteps[skip:]
                if len(getattr(self.scheduler, "sigmas", ())) == len(timesteps) + 1:
                    self.scheduler.sigmas = self.scheduler.sigmas[skip:]
            return result

        return set_timesteps

    def stepped(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """`step` whose result is led."""

        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.step += 1
            total = len(self.scheduler.timesteps)
            if self.step >= total or self.guide.mode == "start":
                return result
            return _replaced(result, lambda z: self.guide.blend(z, self.noised(self.step), self.step, total, self.cell))

        return step


def _of_kind(bound: inspect.BoundArguments, kind: Any) -> list[str]:
    parameters = bound.signature.parameters
    return [name for name in bound.arguments if parameters[name].kind is kind]


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them; what is only positional is left out."""
    found = dict(bound.arguments)
    for name in _of_kind(bound, inspect.Parameter.VAR_POSITIONAL):
        found.pop(name)
    for name in _of_kind(bound, inspect.Parameter.VAR_KEYWORD):
        found |= found.pop(name)
    return found


def _replaced(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A scheduler's result with its sample changed."""
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    result.prev_sample = change(result.prev_sample)
    return result


def _adds_noise(scheduler: Any) -> bool:
    return bool(getattr(getattr(scheduler, "config", None), "stochastic_sampling", False))


def _antiphase_step(scheduler: Any, noise: Antiphase) -> Callable[..., Any]:
    """`step` of a stochastic flow-matching scheduler whose fresh noise is antiphase."""
    inner = scheduler.step

    @functools.wraps(inner)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = inner(model_output, timestep, sample, *args, **kwargs)
        index = int(scheduler.step_index)
        before, after = float(scheduler.sigmas[index - 1]), float(scheduler.sigmas[index])
        clean = sample.float() - before * model_output.float()
        return _replaced(result, lambda z: noise.renoise(z, clean, after))

    return step


@contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An instance attribute for the length of a `with` block."""
    found = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if found is None:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = found


def _called_through(cls: type[Any]) -> type[Any]:
    """A subclass whose call goes through the instance's `ExtendedCall`; by name and module it is the class itself."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(cls.__call__, self)
        held = vars(self).get(_ATTRIBUTE)
        return plain(*args, **kwargs) if held is None else held.call.run(plain, args, kwargs)

    body = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), body)
