"""Frames to files: mp4 and PNG contact sheets. Frames are uint8 (F, H, W, 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsereel.files import replacing

Frames = npt.NDArray[np.uint8]

FPS = 16
_MARGIN = 6
_LABEL = 18
_CELL = 160


def to_uint8(frames: npt.NDArray) -> Frames:
    """Frames in [0, 1] or uint8, (F, H, W, 3), as uint8."""
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def write_mp4(path: Path, frames: Frames, fps: int = FPS) -> None:
    """Write an H.264 mp4 that browsers play. Odd sizes are padded by one repeated row or column (yuv420 needs even).

    Raises:
        ValueError: no frames, or the file cannot be written (folder, permission, full disk).
    """
    import imageio.v2 as imageio

    if frames.ndim != 4 or frames.shape[0] == 0 or frames.shape[-1] != 3:
        raise ValueError(f"frames must have shape (F, H, W, 3) with F >= 1, got {frames.shape}")
    even = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames, even, mode="edge")
    with replacing(path) as temporary:
        try:
            with imageio.get_writer(
                temporary, format="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1
            ) as writer:
                for frame in frames:
                    writer.append_data(frame)  # type: ignore[attr-defined]
        except (OSError, RuntimeError) as error:
            # A full disk reaches us as a broken pipe from ffmpeg.
            raise ValueError(f"could not write {path}: {error}") from error


def side_by_side(left: Frames, right: Frames) -> Frames:
    """Two clips of one size next to each other, with a thin grey line between."""
    line = np.full((left.shape[0], left.shape[1], 4, 3), 128, np.uint8)
    return np.concatenate([left, line, right], axis=2)


def write_contact_sheet(path: Path, rows: Sequence[tuple[str, Frames]], columns: int = 6) -> None:
    """A PNG with one row a clip: a label, then `columns` frames spread evenly over the clip, enlarged to be seen."""
    from PIL import Image, ImageDraw

    height, width = rows[0][1].shape[1:3]
    scale = max(1, round(_CELL / width))
    cell_w, cell_h = width * scale, height * scale
    columns = min(columns, min(len(frames) for _, frames in rows))
    sheet = Image.new(
        "RGB",
        (columns * (cell_w + _MARGIN) + _MARGIN, len(rows) * (cell_h + _LABEL + _MARGIN) + _MARGIN),
        (245, 245, 245),
    )
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames) in enumerate(rows):
        top = _MARGIN + row * (cell_h + _LABEL + _MARGIN)
        draw.text((_MARGIN, top + 2), label, fill=(20, 20, 20))
        for column, index in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            cell = Image.fromarray(frames[index]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(cell, (_MARGIN + column * (cell_w + _MARGIN), top + _LABEL))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
