"""The files VBench's dimensions need: which, from where, how large, and where they go. Nothing is fetched unasked.

Files lie in one folder, `$VBENCH_CACHE_DIR` or `~/.cache/vbench` as the official program has it, in its sub-folders
where it keeps the same file. CLIP is taken as safetensors: reading the official .pt would run it.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsereel_eval.lpips import MissingWeights

_HUB = "https://huggingface.co/timm"
_RELEASES = "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights"


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        path: In the weights folder.
        url: Where it is published.
        megabytes: Its size, about.
    """

    path: str
    url: str
    megabytes: float

    @property
    def digits(self) -> str | None:
        """First digits of its SHA-256, where the publisher puts them into the name."""
        found = re.search(r"-([0-9a-f]{8})\.\w+$", self.path)
        return found[1] if found else None

    def sentence(self, folder: Path) -> str:
        """What to get, from where, how large, and where to put it."""
        size = f"{self.megabytes:.0f} MB" if self.megabytes >= 1 else f"{1000 * self.megabytes:.0f} kB"
        return f"{Path(self.path).name} ({size}) from {self.url}, to be put at {folder / self.path}"


DINO = WeightFile(
    "dino_model/dino_vitbase16_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    343,
)
CLIP_B = WeightFile(
    "clip_model/ViT-B-32-quickgelu.safetensors",
    f"{_HUB}/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors",
    605,
)
CLIP_L = WeightFile(
    "clip_model/ViT-L-14-quickgelu.safetensors",
    f"{_HUB}/vit_large_patch14_clip_224.openai/resolve/main/open_clip_model.safetensors",
    1711,
)
AESTHETIC = WeightFile(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    0.004,
)
RAFT = WeightFile(
    "raft_model/raft_large_C_T_V1-22a6c225.pth",
    "https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth",
    20,
)
AMT = WeightFile("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", 12)
VICLIP = WeightFile(
    "ViCLIP/ViClip-InternVid-10M-FLT.pth",
    "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth",
    1711,
)
MUSIQ = WeightFile("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", f"{_RELEASES}/musiq_spaq_ckpt-358bb6af.pth", 109)

#: files of the dimensions measured here; the other dimensions run in the official program
FILES: dict[str, tuple[WeightFile, ...]] = {
    "subject_consistency": (DINO,),
    "background_consistency": (CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": (AMT,),
    "dynamic_degree": (RAFT,),
    "aesthetic_quality": (CLIP_L, AESTHETIC),
    "imaging_quality": (MUSIQ,),
    "appearance_style": (CLIP_B,),
    "temporal_style": (VICLIP,),
    "overall_consistency": (VICLIP,),
}
#: what the others need, for their one line
OFFICIAL_ONLY: dict[str, str] = {
    "human_action": "l16_ptk710_ftk710_ftk400_f16_res224.pth (0.6 GB, UMT)",
    "object_class": "grit_b_densecap_objectdet.pth (0.9 GB) and detectron2",
    "multiple_objects": "grit_b_densecap_objectdet.pth (0.9 GB) and detectron2",
    "color": "grit_b_densecap_objectdet.pth (0.9 GB) and detectron2",
    "spatial_relationship": "grit_b_densecap_objectdet.pth (0.9 GB) and detectron2",
    "scene": "tag2text_swin_14m.pth (4.5 GB)",
}


def default_folder() -> Path:
    """Where weights are looked for: the official program's cache."""
    return Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench")).expanduser()


def find(dimension: str, folder: Path, *, download: bool = False) -> list[Path]:
    """Paths of a dimension's files, in the order of `FILES`.

    Raises:
        MissingWeights: neither a file nor its conversion to safetensors is there and `download` is off, or the
            dimension runs in the official program only.
        ValueError: a file is damaged, or could not be fetched.
    """
    if dimension not in FILES:
        raise MissingWeights(f"{dimension} runs in the official program only (--official); it needs {_only(dimension)}")
    found, missing = [], []
    for file in FILES[dimension]:
        path = folder / file.path
        converted = path.with_suffix(".safetensors")
        if converted.is_file():
            found.append(converted)
            continue
        if not path.is_file() and download:
            fetch(file, path)
        if path.is_file():
            _check(file, path)
            found.append(path)
        else:
            missing.append(file.sentence(folder))
    if missing:
        raise MissingWeights(f"{dimension} needs {' and '.join(missing)} (--download fetches it)")
    return found


def _only(dimension: str) -> str:
    return OFFICIAL_ONLY.get(dimension, "weights of its own")


def fetch(file: WeightFile, path: Path) -> None:
    """Download one file to a temporary name, check it, and move it to its place.

    Raises:
        ValueError: the address cannot be reached, or the file is not what its name says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.digits)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        host = urllib.parse.urlsplit(file.url).netloc
        raise ValueError(f"could not fetch {Path(file.path).name} from {host}: {error}") from error


def _check(file: WeightFile, path: Path) -> None:
    if file.digits is None:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(file.digits):
        raise ValueError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {file.digits}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors or .pth file, looked for in state_dict or model inside; nothing in a file is run.

    A .pth file that holds more than plain values and tensors is refused; `sparsereel eval convert` makes one of it.

    Raises:
        ValueError: unreadable.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors; if you trust its origin, "
            f"sparsereel eval convert --trust {path} {path.with_suffix('.safetensors')}"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold named tensors only")
    return state
