"""Makes the folder for SODA adapters and says what comes next. Safe to run any number of times; installs no package.

ComfyUI Manager runs this file from the pack's folder after it has installed requirements.txt.
"""

import os
import sys
from pathlib import Path


def comfyui_folder() -> Path | None:
    """The ComfyUI that this pack lies in (<ComfyUI>/custom_nodes/<pack>), also when the pack is a link."""
    places = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    places += [Path(os.path.abspath(__file__)).parents[2], Path.cwd().parent.parent]
    return next((place for place in places if (place / "models").is_dir() and (place / "main.py").is_file()), None)


def main() -> int:
    comfyui = comfyui_folder()
    if comfyui is None:
        print("SODA: this folder does not lie in ComfyUI/custom_nodes, so there is no models folder to prepare yet.")
        print("SODA: move it there and restart ComfyUI (or set COMFYUI_PATH and run install.py again).")
        return 0
    folder = comfyui / "models" / "soda"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        print(f"SODA: cannot make the adapter folder {folder}: {error.strerror}. Make it by hand.", file=sys.stderr)
        return 1
    print(f"SODA: adapters go to {folder} (or to a 'soda' folder inside models/loras).")
    print("SODA: restart ComfyUI, then open Workflow > Browse Templates > SODA for examples that need no download.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
