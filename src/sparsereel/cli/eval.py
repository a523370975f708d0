"""`sparsereel eval`: compare runs, measure distances between sets of clips, score prompts, run whole studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsereel.cli import console

app = typer.Typer(
    help="Measure clips: fidelity, distances between sets, text match, the judge, VBench.", no_args_is_help=True
)

Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this path, or - for stdout.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch missing weights; nothing is fetched without.")]


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="Dense clip, or a folder of clips.")],
    test: Annotated[Path, typer.Argument(help="Tested clip, or a folder of clips of the same names.")],
    versus: Annotated[Path | None, typer.Option(help="A second tested folder; TEST is tested against it too.")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER, such as psnr=25; exit code 1 when the mean misses it.")
    ] = None,
    lpips: Annotated[str, typer.Option(help="alex, vgg, or off.")] = "alex",
    lpips_weights: Annotated[Path | None, typer.Option(help="The network's file.")] = None,
    download: Download = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unreadable and unpaired clips.")] = False,
    json: Json = None,
) -> None:
    """PSNR, SSIM, MS-SSIM, LPIPS, flicker and warping error of TEST against REFERENCE."""
    from sparsereel.evaluate import comparison
    from sparsereel_eval import paired

    thresholds = paired.parse_thresholds(threshold or [])
    measure = comparison.load_measure(lpips, lpips_weights, download=download, say=console.say)
    more: dict[str, Any] = {"versus": versus, "lpips": measure, "skip": skip_bad, "say": console.say}
    with console.progress("comparing") as progress:
        result = comparison.compare_paths(reference, test, progress=progress, **more)
    if not result.pairs:
        raise ValueError("no pair of clips could be compared")
    _print_compared(result)
    sentences = paired.missed(result.table, thresholds)
    console.emit_json(json, {**result.to_dict(), "thresholds": thresholds, "missed": sentences})
    for sentence in sentences:
        console.say(sentence)
    if sentences:
        raise typer.Exit(console.MISSED)


def _print_compared(result: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("figure", "clips", "mean", "95% interval", "worst", "p")
    for name in columns:
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, row in result.table.items():
        worst = row["min"] if row["higher_is_better"] else row["max"]
        p = row.get("p")
        cells = [f"{row['mean']:.4g}", _interval(row["interval"]), f"{worst:.4g}", "-" if p is None else f"{p:.3g}"]
        if result.identical and name in ("psnr", "temporal_psnr"):
            cells[0], cells[2] = "inf", "inf"
        table.add_row(name, str(row["n"]), *cells)
    console.people.print(table)
    if result.identical:
        console.say("every frame is identical: PSNR is infinite, and 100 dB stand for it in the JSON")
    for name, row in result.versus_table.items():
        interval = _interval(row["interval"])
        p = "no difference" if row["p"] is None else f"p {row['p']:.3g}"
        console.say(f"{name}: {row['mean']:+.4g} against the other folder, interval {interval}, {p}")
    for name, reason in result.missing.items():
        console.say(f"{name} left out: {reason}")
    if result.lossy:
        console.say("a clip is stored lossily (mp4 and the like): above about 35 dB the codec decides, not the method")


def _interval(pair: list[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.4g} .. {pair[1]:.4g}"


Features = Annotated[str, typer.Option(help="judge; torchvision:NAME or, for fvd, videomae:SIZE, with --weights.")]
Weights = Annotated[Path | None, typer.Option(help="Safetensors file of the network.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames taken from each clip.")]
Cache = Annotated[Path | None, typer.Option(help="Folder in which features are kept for the next time.")]
Seed = Annotated[int, typer.Option(help="Of random subsets.")]
Set = Annotated[Path, typer.Argument(help="Folder of clips or pictures, or a file of stored features.")]
Force = Annotated[bool, typer.Option("--force", help="Compute from far too few samples all the same.")]


@app.command()
def fid(
    a: Set,
    b: Set,
    features: Features = "judge",
    weights: Weights = None,
    frames: Frames = None,
    cache: Cache = None,
    force: Force = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Frechet distance between the pictures of two sets of clips."""
    _distance("fid", a, b, json, features, weights, frames, cache, force=force, seed=seed)


@app.command()
def kid(
    a: Set,
    b: Set,
    features: Features = "judge",
    weights: Weights = None,
    frames: Frames = None,
    cache: Cache = None,
    subset_size: Annotated[int | None, typer.Option(min=2, help="Samples a subset.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Kernel distance between the pictures of two sets of clips; unbiased, also for few clips."""
    _distance("kid", a, b, json, features, weights, frames, cache, subset_size=subset_size, seed=seed)


@app.command()
def fvd(
    a: Set,
    b: Set,
    features: Features = "judge",
    weights: Weights = None,
    frames: Frames = None,
    cache: Cache = None,
    force: Force = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Frechet distance between two sets of clips, in features of whole clips."""
    _distance("fvd", a, b, json, features, weights, frames, cache, force=force, seed=seed)


@app.command("features")
def store_features(
    clips: Annotated[Path, typer.Argument(help="Folder of clips or pictures.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The safetensors file to write.")],
    metric: Annotated[str, typer.Option("--for", help="fid, kid or fvd.")] = "fid",
    features: Features = "judge",
    weights: Weights = None,
    frames: Frames = None,
) -> None:
    """Keep a set's features in a file that stands for the set in fid, kid and fvd."""
    from sparsereel.evaluate.distances import METRICS, Settings, store
    from sparsereel_eval.lpips import MissingWeights

    if metric not in METRICS:
        raise ValueError(f"--for must be one of {', '.join(METRICS)}, got {metric!r}")
    if output.suffix != ".safetensors":
        raise ValueError(f"-o must be a file that ends in .safetensors, got {output}")
    try:
        with console.progress("clips") as progress:
            count = store(clips, output, metric, Settings(features, weights, frames), console.say, progress)
    except MissingWeights as error:
        raise typer.Exit(console.complain(str(error), console.MISSING)) from error
    console.say(f"wrote {count} feature vectors to {output}")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="Published weights: .pt, .pth, .ckpt or TorchScript.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the file where reading it means that; in a process of its own.")
    ] = False,
    prefix: Annotated[str, typer.Option(help="Keep names that begin so, without it, such as encoder.")] = "",
) -> None:
    """Published weights to a safetensors file; files of plain tensors need no trust."""
    from sparsereel_eval.convert import convert

    count = convert(source, target, trust=trust, prefix=prefix)
    console.say(f"wrote {count} tensors to {target}")


def _distance(metric: str, a: Path, b: Path, json: str | None, *settings: Any, **more: Any) -> None:
    from sparsereel.evaluate.distances import Settings, distance
    from sparsereel_eval.lpips import MissingWeights

    try:
        with console.progress("clips") as progress:
            result = distance(metric, a, b, Settings(*settings, **more), console.say, progress)
    except MissingWeights as error:
        raise typer.Exit(console.complain(str(error), console.MISSING)) from error
    samples = " and ".join(map(str, result["samples"]))
    console.say(f"{metric} {result['value']:.6g}   ({result['features']}, {samples} samples)")
    if metric == "kid":
        console.say(f"deviation over {result['subsets']} subsets of {result['subset_size']}: {result['std']:.3g}")
    elif result["extrapolated"] is not None:
        console.say(f"extrapolated to infinitely many samples: {result['extrapolated']:.6g}")
    for warning in result["warnings"]:
        console.say(f"warning: {warning}")
    console.emit_json(json, {**result, "a": str(a), "b": str(b)})


vbench = typer.Typer(help="VBench: totals from its result files, and what can be measured here.", no_args_is_help=True)
app.add_typer(vbench, name="vbench")


@vbench.command("score")
def vbench_score(
    files: Annotated[list[Path], typer.Argument(help="The official program's *_eval_results.json files.")],
    json: Json = None,
) -> None:
    """Quality, Semantic and Total from raw scores; Total only when all 16 dimensions are there."""
    from dataclasses import asdict

    from rich.table import Table

    from sparsereel_eval.vbench.scores import read_results, score

    found = score(read_results(files))
    table = Table("dimension", "raw", "normalised", box=None, pad_edge=False)
    for name, raw in found.raw.items():
        table.add_row(name, f"{raw:.4f}", f"{100 * found.normalised[name]:.2f}")
    console.people.print(table)
    for name, value in (("Quality", found.quality), ("Semantic", found.semantic), ("Total", found.total)):
        console.say(f"{name} {100 * value:.2f}" if value is not None else f"no {name}: {_lacking(name, found.missing)}")
    console.emit_json(json, asdict(found))


def _lacking(name: str, missing: tuple[str, ...]) -> str:
    from sparsereel_eval.vbench.names import DIMENSIONS

    group = name.lower()
    members = [key for key, about in DIMENSIONS.items() if group in (about.group, "total")]
    lacking = [key for key in missing if key in members]
    return f"{len(lacking)} of {len(members)} dimensions are missing ({', '.join(lacking)})"


Environment = Annotated[Path | None, typer.Option("--env", help="The official program's environment.")]


@vbench.command("measure")
def vbench_measure(
    clips: Annotated[Path, typer.Argument(help="A clip or a folder of clips; of any prompts, unless --info is given.")],
    dimensions: Annotated[list[str] | None, typer.Option("--dimension", help="May be given several times.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks' files; default $VBENCH_CACHE_DIR or ~/.cache/vbench.")
    ] = None,
    info: Annotated[
        Path | None, typer.Option(help="The official VBench_full_info.json: clips are named {prompt}-{index}.mp4.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a clip, for temporal style and overall consistency without --info.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for files in official layout.")] = None,
    name: Annotated[str | None, typer.Option(help="First part of their names.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second, over the files'.")] = None,
    official: Annotated[bool, typer.Option("--official", help="Run the official program; see vbench setup.")] = False,
    env: Environment = None,
    download: Download = False,
    json: Json = None,
) -> None:
    """Dimensions whose weights are there, on any clips; the others say in a line what they need."""
    from sparsereel.evaluate.vbench import Sources, measure
    from sparsereel_eval.vbench.weights import default_folder

    if official:
        _vbench_official(clips, dimensions, weights, info, output, name or "official", env, json)
        return
    sources = Sources(weights or default_folder(), download, fps)
    places: dict[str, Any] = {"info": info, "prompts": prompts, "output": output, "name": name or "vbench_like"}
    with console.progress("clips") as progress:
        result = measure(clips, dimensions, console.say, sources=sources, progress=progress, **places)
    for key, row in result["vbench_like"].items():
        console.say(f"{key} {row['score']:.4f}   interval {_interval(row['interval'])}   ({row['n']} clips)")
    console.emit_json(json, result)
    if dimensions and result["left_out"]:
        raise typer.Exit(console.MISSING)


def _vbench_official(
    clips: Path,
    dimensions: list[str] | None,
    weights: Path | None,
    info: Path | None,
    output: Path | None,
    name: str,
    env: Path | None,
    json: str | None,
) -> None:
    from sparsereel_eval.lpips import MissingWeights
    from sparsereel_eval.vbench import official
    from sparsereel_eval.vbench.names import DIMENSIONS

    if output is None:
        raise ValueError("--official needs -o, a folder for the official program's files")
    chosen = dimensions or [key for key, about in DIMENSIONS.items() if info or about.custom]
    try:
        result = official.run(
            env or official.default_environment(), clips, chosen, output, name=name, info=info, weights=weights
        )
    except MissingWeights as error:
        raise typer.Exit(console.complain(str(error), console.MISSING)) from error
    for key, row in result["results"].items():
        console.say(f"{key} {row[0]:.4f}")
    for key, reason in result["failed"].items():
        console.say(f"{key} failed: {reason}")
    console.emit_json(json, result)
    if result["failed"]:
        raise typer.Exit(console.MISSING)


@vbench.command("setup")
def vbench_setup(env: Environment = None, download: Download = False) -> None:
    """Build the official program's own environment, once: about 6 GB from PyPI, with --download."""
    from sparsereel_eval.lpips import MissingWeights
    from sparsereel_eval.vbench import official

    place = env or official.default_environment()
    if not download:
        text = f"setup fetches about 6 GB from PyPI into {place}; say --download to do so"
        raise typer.Exit(console.complain(text, console.MISSING))
    try:
        official.build(place, console.say)
    except MissingWeights as error:
        raise typer.Exit(console.complain(str(error), console.MISSING)) from error
    console.say(f"built {place}; use it with sparsereel eval vbench measure --official")


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="YAML: prompts, seeds, plans, sizes; see docs/evaluation.md.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for clips, result.json and report.html.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline, over the file's.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Redo what a changed configuration changes.")] = False,
    json: Json = None,
) -> None:
    """A whole study: generate dense and with every plan, measure, write one JSON and one HTML report."""
    from dataclasses import replace

    from sparsereel.evaluate.config import load_config
    from sparsereel.evaluate.study import run_study

    settings = load_config(config)
    if model is not None:
        settings = replace(settings, model=model)
    result = run_study(settings, output, update=update, say=console.say)
    if not result:
        console.say("this process has made its clips; the first one measures them")
        return
    for name, row in result["summary"].items():
        psnr = row["figures"]["psnr"]
        fidelity = f"PSNR {psnr['mean']:.2f} dB ({_interval(psnr['interval'])})"
        cold = "" if row["speedup_is_warm"] else " with the building of kernels and masks"
        console.say(f"{name}: {row['speedup']:.2f}x{cold}, density {row['density']:.3f}, {fidelity}")
    console.say(f"wrote {output / 'result.json'}, {output / 'report.html'}")
    console.emit_json(json, result)
    for sentence in result["missed"]:
        console.say(sentence)
    if result["missed"]:
        raise typer.Exit(console.MISSED)


@app.command("judge")
def judge_command(
    clips: Annotated[Path, typer.Argument(help="A clip or a folder of clips made by minireel.")],
    prompt: Annotated[str | None, typer.Option(help="Of every clip, where no JSON beside it says it.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a clip in the clips' order.")] = None,
    window: Annotated[float, typer.Option(min=0.01, help="Seconds judged at a time, for drift.")] = 1.0,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second, over the file's.")] = None,
    json: Json = None,
) -> None:
    """Does a clip show its prompt's digit, colour, count and motion, and does it still do so at the end?"""
    from sparsereel.evaluate.judging import judge_paths

    result = judge_paths(clips, prompt, prompts, window=window, fps=fps)
    for name, row in result["table"].items():
        console.say(f"{name} {row['mean']:.3f}   interval {_interval(row['interval'])}   ({row['n']} clips)")
    for name, row in result["drift"].items():
        console.say(
            f"{name} over time: {row['start']:.3f} at the start, {row['end']:.3f} at the end ({row['clips']} clips)"
        )
    console.emit_json(json, result)


@app.command()
def clip(
    clips: Annotated[Path, typer.Argument(help="A clip or a folder of clips.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a clip in the clips' order.")] = None,
    model: Annotated[str, typer.Option(help="open_clip's name of the model.")] = "ViT-B-32-quickgelu",
    weights: Weights = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames taken from each clip.")] = 8,
    json: Json = None,
) -> None:
    """How well clips match their prompts: mean CLIP cosine of text and frames."""
    from sparsereel.evaluate.text import score_clips
    from sparsereel_eval.lpips import MissingWeights

    try:
        result = score_clips(clips, prompts, model, weights, frames)
    except MissingWeights as error:
        raise typer.Exit(console.complain(str(error), console.MISSING)) from error
    for name in ("text", "steadiness"):
        row = result[name]
        if row is not None:
            console.say(f"{name} {row['mean']:.4f}   interval {_interval(row['interval'])}   ({row['n']} clips)")
    console.emit_json(json, result)
