"""Run the `distinit` command as `python -m distinit`."""

from __future__ import annotations

from distinit.cli import main

if __name__ == "__main__":
    main()
