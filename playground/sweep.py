"""How much of what the best learning rate of a sweep learns the preset rates of SODA Train learn.

    python -m playground.sweep [--few] [--device cuda] [--out playground/results/presets.jsonl]

For subject and style, each with the targets that its role presets: one training per rate, its fall of the held-out
loss, and that as a share of the best rate's. Multiples of the preset are swept, the preset among them. With --few the
subject is learnt from 5 drawings and the style from 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from soda.training.presets import LEARNING_RATES, TARGETS

from .bench import Bench, Run, gain
from .concepts import SUBJECTS

MULTIPLES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
CONCEPTS = ("pom", "comic")
FEW = {"subject": 5, "style": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--few", action="store_true", help="learn from as few drawings as SODA Train's presets promise")
    options = parser.parse_args()
    bench = Bench(options.device)
    rows = []
    for concept in CONCEPTS:
        role = "subject" if concept in SUBJECTS else "style"
        of, preset = {role: concept}, LEARNING_RATES[TARGETS[role]]
        base = bench.held_out({}, **of)
        falls = {}
        for multiple in MULTIPLES:
            run = Run(concept, "lq", preset * multiple, drawings=FEW[role] if options.few else None)
            weights, _ = bench.train(run)
            fall, interval = gain(base, bench.held_out(weights, **of))
            falls[run.rate] = round(fall, 5)
            print(f"{concept} {run.rate:.4g}: {fall:.4f} +- {interval:.4f}", flush=True)
        best = max(falls, key=lambda rate: falls[rate])
        row = {"concept": concept, "drawings": run.drawings or "all", "device": options.device, "steps": run.steps,
               "preset": preset, "best": best, "share": falls[preset] / falls[best], "falls": falls}  # fmt: skip
        print(f"{concept}: the preset {preset:.4g} learns {row['share']:.1%} of what {best:.4g} does")
        rows.append(row)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
