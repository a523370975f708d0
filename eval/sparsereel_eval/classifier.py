"""The judge's only learned part: which digit is in a 32 x 32 window of ink."""

from __future__ import annotations

from pathlib import Path

from torch import nn

WEIGHTS = Path(__file__).parent / "judge_weights.safetensors"


class DigitClassifier(nn.Sequential):
    """Windows (N, 1, 32, 32) fp32 in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            *_block(1, 16),
            *_block(16, 24, stride=2),
            *_block(24, 32),
            *_block(32, 48, stride=2),
            *_block(48, 48),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(192, 10),
        )


def _block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def save_classifier(model: DigitClassifier, path: Path = WEIGHTS) -> None:
    """Write the weights as fp16 safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, path)


def load_classifier(path: Path = WEIGHTS) -> DigitClassifier:
    """The trained classifier, in evaluation mode.

    Raises:
        ValueError: there is no such file.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"No judge weights at {path}; train them with `python -m sparsereel_eval.train_judge`.")
    model = DigitClassifier()
    # load_state_dict casts fp16 to the module's fp32 and the batch counters to integers.
    model.load_state_dict(load_file(path))
    return model.eval()
