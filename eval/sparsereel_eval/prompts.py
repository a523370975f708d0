"""Read a minireel prompt back: what the clip should show."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsereel_eval.digits import BACKGROUNDS, COLOURS, DIRECTIONS


@dataclass(frozen=True)
class WantedDigit:
    """One digit of a prompt; `direction` is None where the prompt names none."""

    colour: str
    value: int
    direction: str | None


@dataclass(frozen=True)
class Wanted:
    """Everything a prompt asks for."""

    digits: tuple[WantedDigit, ...]
    background: str


_DIGIT = rf"an? ({'|'.join(COLOURS)}) (\d)(?: moving ({'|'.join(DIRECTIONS)}))?"
_PROMPT = re.compile(rf"({_DIGIT}(?: and {_DIGIT})*) on ({'|'.join(BACKGROUNDS)})")


def parse_prompt(prompt: str) -> Wanted:
    """Parse "a red 3 moving right on navy" or "a red 3 and a blue 7 on black".

    Raises:
        ValueError: the prompt has another form, so that there is nothing to judge by.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
    if not match:
        raise ValueError(
            f"Cannot judge the prompt {prompt!r}; expected"
            " 'a COLOUR DIGIT [moving DIRECTION] [and a ...] on BACKGROUND'"
            f" with colours {', '.join(COLOURS)}; backgrounds {', '.join(BACKGROUNDS)};"
            f" directions {', '.join(DIRECTIONS)}."
        )
    found = re.findall(_DIGIT, match[1])
    digits = tuple(WantedDigit(colour, int(value), direction or None) for colour, value, direction in found)
    return Wanted(digits, match[match.lastindex or 0])
