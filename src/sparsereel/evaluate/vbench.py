"""VBench's dimensions on a folder of clips: those whose weights are there; the others say what they need.

Custom mode measures clips of any prompts. With the official VBench_full_info.json clips are taken by their names,
`{prompt}-{index}.mp4`, each dimension on its own prompts. Results have the official layout, so that tools read them; as
own versions they are named vbench_like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsereel.files import write_json

if TYPE_CHECKING:
    from sparsereel_eval.readers import ClipFile
    from sparsereel_eval.vbench.layout import Prompt

Say = Callable[[str], None]
Measure = Callable[["ClipFile", str | None], float]
#: dimensions whose aggregate weighs every pair of frames alike, as the official program on one device does
_BY_FRAME = ("subject_consistency", "background_consistency")
_BY_PROMPT = ("temporal_style", "overall_consistency")


@dataclass(frozen=True)
class Sources:
    """Where weights come from, whether to fetch what is missing, and the frame rate over that of the files."""

    folder: Path
    download: bool = False
    fps: float | None = None


def measure(
    clips: Path,
    names: Sequence[str] | None,
    say: Say,
    *,
    sources: Sources | None = None,
    info: Path | None = None,
    prompts: Path | None = None,
    output: Path | None = None,
    name: str = "vbench_like",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure dimensions on a clip or a folder of clips.

    Args:
        names: Dimensions; None for all 16.
        sources: Of the weights; None for the official program's cache.
        info: The official VBench_full_info.json, for the official prompts; None for custom mode.
        prompts: In custom mode, a file with one prompt a clip in the clips' order; None for the JSON beside each clip.
        output: Folder for `{name}_eval_results.json` and `{name}_full_info.json` in the official layout.
        progress: Called after each clip of a dimension with how many are done, of how many.

    Returns:
        "vbench_like": dimension to its summary over clips, its score and every clip's value; "left_out": dimension to
        what it needs; "coverage": dimension to expected and found clips, with `info`.

    Raises:
        ValueError: unknown dimension, unreadable clips, clips too short, no clip of the official prompts.
    """
    from sparsereel_eval.lpips import MissingWeights
    from sparsereel_eval.vbench.layout import read_info
    from sparsereel_eval.vbench.names import DIMENSIONS, dimension
    from sparsereel_eval.vbench.weights import default_folder

    sources = sources or Sources(default_folder())
    chosen = [dimension(each) for each in names] if names else list(DIMENSIONS)
    if info is not None and prompts is not None:
        raise ValueError("give --info or --prompts, not both")
    suite = None if info is None else read_info(info)
    result: dict[str, Any] = {"vbench_like": {}, "left_out": {}, "coverage": {}}
    layout: dict[str, list[Any]] = {}
    for key in dict.fromkeys(chosen):
        try:
            if suite is None and key == "appearance_style":
                raise MissingWeights(f"{key} compares with the official prompts' styles: give --info")
            run = _measure_of(key, sources)
            if suite is None:
                jobs = list(_custom_jobs(clips, key, prompts))
            else:
                jobs = list(_suite_jobs(clips, key, suite, result["coverage"], say))
        except MissingWeights as error:
            result["left_out"][key] = str(error)
            say(f"{key} left out: {error}")
            continue
        if jobs:
            result["vbench_like"][key], layout[key] = _run(key, run, jobs, progress)
    if output is not None:
        write_json(output / f"{name}_eval_results.json", layout)
        listed = [{"video_path": path, "dimension": key} for key, rows in layout.items() for path in _paths(rows)]
        write_json(output / f"{name}_full_info.json", listed)
    return result


def _paths(rows: list[Any]) -> list[str]:
    return [row["video_path"] for row in rows[1]]


def _custom_jobs(clips: Path, key: str, prompts: Path | None) -> Iterator[tuple[Path, str | None]]:
    """All clips, each with its prompt where the dimension compares with one."""
    from sparsereel.evaluate.text import find_prompts
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.lpips import MissingWeights

    files = list_clips(clips)
    texts: Sequence[str | None] = [None] * len(files)
    if key in _BY_PROMPT:
        try:
            texts = find_prompts(files, prompts)
        except ValueError as error:
            if prompts is not None:
                raise
            raise MissingWeights(f"{key} compares with prompts: {error}, or --info") from error
    yield from zip(files, texts, strict=True)


def _suite_jobs(
    clips: Path, key: str, prompts: list[Prompt], coverage: dict[str, Any], say: Say
) -> Iterator[tuple[Path, str | None]]:
    """Clips of a dimension's official prompts, each with its prompt, or with the style that it names."""
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.vbench import layout

    own = {prompt.text: prompt for prompt in prompts if key in prompt.dimensions}
    covered = layout.coverage(clips, own, key)
    coverage[key] = {"expected": covered.expected, "found": covered.found}
    if covered.missing:
        say(f"{key}: {covered.found} of {covered.expected} clips are there, {covered.missing[0]!r} is missing")
    for path in list_clips(clips):
        text, index = layout.prompt_of(path)
        if text in own and index is not None:
            yield path, text if key in _BY_PROMPT else own[text].style


def _run(
    key: str, run: Measure, jobs: list[tuple[Path, str | None]], progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], list[Any]]:
    from sparsereel_eval.intervals import summarise
    from sparsereel_eval.readers import open_clip

    values, weights = [], []
    for path, text in jobs:
        clip = open_clip(path)
        try:
            values.append(run(clip, text))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        progress(len(values), len(jobs))
        weights.append((clip.frames or sum(1 for _ in clip)) - 1 if key in _BY_FRAME else 1)
    score = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    # The official files hold ratings of 0 to 100 for single clips, and yes or no for dynamic degree.
    shown = [100 * v for v in values] if key == "imaging_quality" else values
    shown = [bool(v) for v in values] if key == "dynamic_degree" else shown
    rows = [{"video_path": str(path), "video_results": v} for (path, _), v in zip(jobs, shown, strict=True)]
    clips = {str(path): value for (path, _), value in zip(jobs, values, strict=True)}
    return {**summarise(values), "score": score, "clips": clips}, [score, rows]


def _measure_of(key: str, sources: Sources) -> Measure:
    """The function of a dimension, with its weights loaded.

    Raises:
        MissingWeights: a file or a package is not there.
    """
    from sparsereel_eval.vbench import backbones, dimensions
    from sparsereel_eval.vbench.weights import find

    files = find(key, sources.folder, download=sources.download)
    if key == "temporal_flickering":
        return lambda clip, _: dimensions.temporal_flickering(clip)
    if key == "subject_consistency":
        subject = backbones.subject_features(backbones.load_dino(files[0]))
        return lambda clip, _: dimensions.consistency(clip, subject)
    if key == "background_consistency":
        scene = backbones.clip_features(backbones.load_clip(files[0], "ViT-B-32-quickgelu").encode_image)
        return lambda clip, _: dimensions.consistency(clip, scene)
    if key == "dynamic_degree":
        flow = backbones.optical_flow(backbones.load_raft(files[0]))
        return lambda clip, _: float(dimensions.is_dynamic(clip, sources.fps or clip.fps or 0, flow))
    if key == "aesthetic_quality":
        encode = backbones.load_clip(files[0], "ViT-L-14-quickgelu").encode_image
        beauty = backbones.aesthetic_rating(encode, backbones.load_head(files[1]))
        return lambda clip, _: dimensions.aesthetic_quality(clip, beauty)
    if key == "imaging_quality":
        quality = backbones.imaging_rating(backbones.load_musiq(files[0]))
        return lambda clip, _: dimensions.imaging_quality(clip, quality)
    if key == "motion_smoothness":
        between = backbones.interpolation(backbones.load_amt(files[0]))
        return lambda clip, _: dimensions.motion_smoothness(clip, between)
    return _appearance(files[0]) if key == "appearance_style" else _by_prompt(files[0])


def _by_prompt(file: Path) -> Measure:
    from sparsereel_eval.vbench import backbones, dimensions, viclip

    model, tokens = backbones.load_viclip(file), viclip.tokenizer()
    features = backbones.video_features(model.encode_video)

    def run(clip: ClipFile, prompt: str | None) -> float:
        total = clip.frames or sum(1 for _ in clip)
        wanted = dimensions.middle_frames(total, viclip.FRAMES)
        kept = {index: frame for index, frame in enumerate(clip) if index in wanted}
        text = model.encode_text(tokens(prompt or ""))[0]
        return dimensions.text_consistency([kept[index] for index in wanted], features, text)

    return run


def _appearance(file: Path) -> Measure:
    import open_clip

    from sparsereel_eval.vbench import backbones, dimensions

    model = backbones.load_clip(file, "ViT-B-32-quickgelu")
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    features = backbones.pil_clip_features(model.encode_image)

    def run(clip: ClipFile, style: str | None) -> float:
        if not style:
            raise ValueError("the official prompts name no appearance_style for this clip")
        return dimensions.appearance_style(clip, features, model.encode_text(tokens([style]))[0])

    return run
