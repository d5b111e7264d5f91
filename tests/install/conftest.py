"""The runner is importable here; ComfyUI is only ever started as a process."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
