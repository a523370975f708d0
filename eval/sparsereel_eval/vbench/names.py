"""The 16 dimensions of VBench 1: group, range for normalisation, weight, prompt suite, and the weights they need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        group: "quality" or "semantic".
        low, high: Raw scores that become 0 and 1.
        weight: In its group's mean.
        suite: Prompt file, without suffix, it is measured on.
        needs: The model the official program runs.
        custom: Can be measured on clips of any prompt (the official custom-input mode).
    """

    group: str
    low: float
    high: float
    weight: float
    suite: str
    needs: str
    custom: bool = False


_SUBJECT, _OVERALL = "subject_consistency", "overall_consistency"
_GRIT, _CLIP, _VICLIP = "GRiT (grit_b_densecap_objectdet.pth)", "CLIP ViT-B/32", "ViCLIP (ViClip-InternVid-10M-FLT.pth)"

DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462, 1.0, 1, _SUBJECT, "DINO ViT-B/16", True),
    "background_consistency": Dimension("quality", 0.2615, 1.0, 1, "scene", _CLIP, True),
    "temporal_flickering": Dimension("quality", 0.6293, 1.0, 1, "temporal_flickering", "no weights", True),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975, 1, _SUBJECT, "AMT-S (amt-s.pth)", True),
    "dynamic_degree": Dimension("quality", 0.0, 1.0, 0.5, _SUBJECT, "RAFT (raft-things.pth)", True),
    "aesthetic_quality": Dimension(
        "quality", 0.0, 1.0, 1, _OVERALL, "CLIP ViT-L/14 and sa_0_4_vit_l_14_linear.pth", True
    ),
    "imaging_quality": Dimension("quality", 0.0, 1.0, 1, _OVERALL, "MUSIQ (musiq_spaq_ckpt-358bb6af.pth)", True),
    "object_class": Dimension("semantic", 0.0, 1.0, 1, "object_class", _GRIT),
    "multiple_objects": Dimension("semantic", 0.0, 1.0, 1, "multiple_objects", _GRIT),
    "human_action": Dimension("semantic", 0.0, 1.0, 1, "human_action", "UMT ViT-L/16 (l16_ptk710_ftk710_ftk400)"),
    "color": Dimension("semantic", 0.0, 1.0, 1, "color", _GRIT),
    "spatial_relationship": Dimension("semantic", 0.0, 1.0, 1, "spatial_relationship", _GRIT),
    "scene": Dimension("semantic", 0.0, 0.8222, 1, "scene", "Tag2Text (tag2text_swin_14m.pth)"),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855, 1, "appearance_style", _CLIP),
    "temporal_style": Dimension("semantic", 0.0, 0.364, 1, "temporal_style", _VICLIP),
    "overall_consistency": Dimension("semantic", 0.0, 0.364, 1, _OVERALL, _VICLIP),
}

#: prompts in each suite file; 946 in all
SUITES = {
    "appearance_style": 90,
    "color": 85,
    "human_action": 100,
    "multiple_objects": 82,
    "object_class": 79,
    "overall_consistency": 93,
    "scene": 86,
    "spatial_relationship": 84,
    "subject_consistency": 72,
    "temporal_flickering": 75,
    "temporal_style": 100,
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
#: clips a prompt; flickering takes 25, of which the still ones are kept
SAMPLES, FLICKERING_SAMPLES = 5, 25


def dimension(name: str) -> str:
    """The key of a dimension; spaces, hyphens and capitals are accepted as the official scripts mix them.

    Raises:
        ValueError: there is no such dimension.
    """
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    if key not in DIMENSIONS:
        raise ValueError(f"unknown VBench dimension {name!r}; allowed: {', '.join(DIMENSIONS)}")
    return key
