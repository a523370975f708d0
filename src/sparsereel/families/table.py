"""The table of models in docs/models.md; `python -m sparsereel.families.table` prints it."""

from __future__ import annotations

from sparsereel.families import FAMILIES, REFUSED

#: families of which trained weights were run
_TRAINED = {"wan": "trained weights (minireel)", "stable_diffusion": "trained weights (ministill)"}
_CONFORMANCE = "conformance"


def table() -> str:
    """Markdown: every covered family, then every refused class."""
    rows = [("Family", "Models", "Classes", "Seam", "Checked with"), ("---",) * 5]
    for family in FAMILIES:
        classes = ", ".join(f"`{name}`" for name in family.classes)
        tier = _TRAINED.get(family.name, _CONFORMANCE)
        rows.append((f"`{family.name}`", family.covers, classes, family.seam, tier))
    refused = [("Class", "Why it stays as it is"), ("---",) * 2]
    refused += [(f"`{name}`", reason) for name, reason in sorted(REFUSED.items())]
    covered, left = ("\n".join("| " + " | ".join(row) + " |" for row in part) for part in (rows, refused))
    return f"{covered}\n\n{left}\n"


if __name__ == "__main__":
    print(table(), end="")
