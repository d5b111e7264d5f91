"""Makes the folder for SODA adapters and says what comes next. Safe to run any number of times; installs no package.

ComfyUI Manager runs this file from the pack's folder after it has installed requirements.txt.
"""

import sys
from pathlib import Path

PACK = Path(__file__).absolute().parent


def main() -> int:
    if PACK.parent.name != "custom_nodes":
        print(f"SODA: {PACK} does not lie in a ComfyUI/custom_nodes folder, so there is nothing to prepare yet.")
        print("SODA: put it there and restart ComfyUI; or try 'python run.py demo', which needs no ComfyUI.")
        return 0
    folder = PACK.parents[1] / "models" / "soda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"SODA: cannot make the adapter folder {folder} ({error.strerror}): make it by hand.", file=sys.stderr)
        return 1
    print(f"SODA: adapters go to {folder}, or to a folder 'soda' inside models/loras.")
    print("SODA: restart ComfyUI; Workflow > Browse Templates then offers examples that need no download.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
