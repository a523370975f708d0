"""`sparsereel eval`: compare runs, measure distances between sets of clips, score prompts, run whole studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsereel.cli import console

app = typer.Typer(help="Measure clips: fidelity, distances between sets, text match, VBench.", no_args_is_help=True)

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
    result = comparison.compare_paths(reference, test, versus=versus, lpips=measure, skip=skip_bad, say=console.say)
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
        table.add_row(name, str(row["n"]), *cells)
    console.people.print(table)
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
