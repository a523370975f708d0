"""`python -m sparsereel`, and `accelerate launch -m sparsereel` for several processes."""

from __future__ import annotations

from sparsereel.cli import main

if __name__ == "__main__":
    main()
