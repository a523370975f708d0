"""Which clips a path names, and which clip of one folder belongs to which of another."""

from __future__ import annotations

from pathlib import Path

from sparsereel_eval.readers import CLIP_SUFFIXES, PICTURE_SUFFIXES, natural_key

_NAMED = 5  # names listed in a sentence


def list_clips(path: str | Path) -> list[Path]:
    """The clips a path stands for, in natural order.

    A file is one clip. A folder with clip files, or with folders of pictures, is a set of clips; pictures that lie
    beside clip files (contact sheets) are left out. A folder that holds nothing but pictures is one clip.

    Raises:
        ValueError: the path does not exist or holds no clip.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        return [path]
    shown = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    clips = [entry for entry in shown if entry.is_file() and entry.suffix.lower() in CLIP_SUFFIXES]
    clips += [entry for entry in shown if entry.is_dir() and _holds_pictures(entry)]
    if clips:
        return sorted(clips, key=lambda entry: natural_key(entry.name))
    if _holds_pictures(path):
        return [path]
    raise ValueError(f"the folder {path} holds no clips ({', '.join(CLIP_SUFFIXES)} or pictures)")


def pair_clips(reference: str | Path, test: str | Path, *, skip: bool = False) -> tuple[list[tuple[Path, Path]], list]:
    """Pairs of clips of the same name, without suffix, in natural order.

    Args:
        reference, test: Two clips, or two folders of clips.
        skip: Leave out clips without a partner instead of refusing.

    Returns:
        The pairs, and the paths left out.

    Raises:
        ValueError: a clip has no partner, two clips of a folder share a name, or a file is compared with a folder.
    """
    left, right = list_clips(reference), list_clips(test)
    alone = [paths == [Path(given)] for paths, given in ((left, reference), (right, test))]
    if all(alone):
        return [(left[0], right[0])], []
    if any(alone):
        raise ValueError(f"{reference} and {test} must both be clips or both be folders of clips")
    by_name, others = _by_name(left), _by_name(right)
    lonely = [path for name, path in by_name.items() if name not in others]
    lonely += [path for name, path in others.items() if name not in by_name]
    if lonely and not skip:
        raise ValueError(f"no partner of the same name for {name_some(lonely)}")
    pairs = [(path, others[name]) for name, path in by_name.items() if name in others]
    if not pairs:
        raise ValueError(f"{reference} and {test} have no clip name in common")
    return pairs, lonely


def name_some(paths: list[Path]) -> str:
    """Up to five paths in a sentence."""
    rest = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(map(str, paths[:_NAMED])) + rest


def _by_name(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same name; which of them is meant is not clear")
        found[name] = path
    return found


def _holds_pictures(folder: Path) -> bool:
    return any(file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".") for file in folder.iterdir())
