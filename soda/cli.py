"""The command line: `soda inspect|validate|mix|convert`, or `python -m soda ...`.

Exit code 0 means done, 1 that a file was refused (one sentence on stderr), 2 that the command was not understood.
With `--json` the answer on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter
from .convert import BaseWeights, read_official, renamed, save_difference, save_lora, to_comfy, to_diffusers
from .errors import SodaError, SodaFileError
from .file import load, save, validate
from .metadata import label
from .mixing import OPERATORS, mix
from .plot import draw
from .summary import as_json, summarise
from .transport import transport

MESSAGE_LIMIT = 1000
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (SodaError, OSError) as error:
        print(f"soda: {_one_line(str(error), MESSAGE_LIMIT)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soda", description="Look at, mix and convert SODA adapter files.")
    commands = parser.add_subparsers(required=True, metavar="inspect|validate|mix|convert")

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.add_argument("--json", action="store_true", help="answer with one JSON document")
        sub.set_defaults(run=run)
        return sub

    inspect = command("inspect", _inspect, "Say what adapters hold, and draw it.")
    inspect.add_argument("files", nargs="+", metavar="FILE")
    inspect.add_argument("--plot", metavar="PNG", help="draw rotation and spectrum change of every layer (one FILE)")

    check = command("validate", _validate, "Check that files are adapters.")
    check.add_argument("files", nargs="+", metavar="FILE")

    blend = command("mix", _mix, "Mix adapters into one adapter of the same size.")
    blend.add_argument("parts", nargs="+", metavar="FILE:WEIGHT", help="a file and its weight; without one, 1")
    blend.add_argument("-o", "--output", required=True, metavar="FILE")
    blend.add_argument("--operator", choices=OPERATORS, default="lie_sum",
                       help="default: lie_sum; soda.mixing says what each keeps")  # fmt: skip
    blend.add_argument("--density", type=float, default=argparse.SUPPRESS,
                       help="of ties and dare: the share of numbers that stays; default: 0.5")  # fmt: skip
    blend.add_argument("--seed", type=int, default=argparse.SUPPRESS,
                       help="of dare: which numbers stay; default: 0")  # fmt: skip
    blend.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")

    change = command("convert", _convert, "Convert adapters from and to other formats.")
    change.add_argument("file", metavar="FILE", help="an adapter, or an official .pt table")
    change.add_argument("-o", "--output", required=True, metavar="FILE")
    change.add_argument(
        "--to", choices=TARGETS, default="soda", help="soda (default): an adapter, from .pt or in ComfyUI's names; "
        "diffusers: the same in diffusers' names; diff: the full change of the weights; lora: its nearest LoRA"
    )  # fmt: skip
    change.add_argument("--base", metavar="FILE", help="the base model's .safetensors; for .pt, diff, lora, --onto")
    change.add_argument("--onto", metavar="FILE", help="fit the adapter, trained on --base, to this base instead")
    change.add_argument("--rank", type=int, default=64, help="of the LoRA; default: 64")
    change.add_argument("--decomposition", choices=("svd", "lq"), default="svd", help="of a .pt table; default: svd")
    change.add_argument("--dtype", choices=DTYPES, help="default: fp16 for diff and lora, else fp32")
    change.add_argument("--device", type=_device, default="cpu", help="where bases are computed; default: cpu")
    return parser


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"PyTorch has no device {name!r} here") from None
    return name


def _inspect(options: argparse.Namespace) -> int:
    if options.plot and len(options.files) > 1:
        raise SodaError("--plot draws one file; give one")
    adapters = [load(file) for file in options.files]
    if options.json:
        print(json.dumps([{"file": file} | as_json(a) for file, a in zip(options.files, adapters, strict=True)]))
    else:
        for file, adapter in zip(options.files, adapters, strict=True):
            print(f"{file}\n{_describe(adapter)}")
    if options.plot:
        draw(adapters[0], options.plot)
    return 0


def _describe(adapter: Adapter) -> str:
    """A few lines for people."""
    layers = summarise(adapter)
    known = adapter.metadata
    count = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    lines = [f"{count}, {', '.join(sorted({layer.decomposition for layer in layers}))}; {adapter.role}"]
    for title, key in (("title", "modelspec.title"), ("base", "soda.base_model"), ("for", "modelspec.architecture"),
                       ("trigger words", "modelspec.trigger_phrase"), ("mix of", "modelspec.merged_from"),
                       ("training", "soda.training")):  # fmt: skip
        if known.get(key):
            lines.append(f"{title}: {_one_line(known[key])}")
    most = max(layers, key=lambda layer: layer.angle_rms)
    mean = sum(layer.angle_rms for layer in layers) / len(layers)
    lines.append(f"rotation: {mean:.2f} degrees on average, {most.angle_rms:.2f} at most ({_one_line(most.name)})")
    spectra = [layer.spectrum_rms for layer in layers if layer.spectrum_rms is not None]
    if spectra:
        lines.append(f"spectrum: changed by {sum(spectra) / len(spectra):.2g} on average, {max(spectra):.2g} at most")
    return "\n".join(f"  {line}" for line in lines)


def _one_line(text: str, limit: int = 200) -> str:
    """Text from a file, fit for a terminal."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def _validate(options: argparse.Namespace) -> int:
    results = [(file, *validate(file)) for file in options.files]
    if options.json:
        print(json.dumps([{"file": file, "ok": ok, "reason": reason} for file, ok, reason in results]))
    else:
        for file, ok, reason in results:
            print(f"{file}: ok" if ok else _one_line(reason, MESSAGE_LIMIT), file=sys.stdout if ok else sys.stderr)
    return 0 if all(ok for _, ok, _ in results) else 1


def _mix(options: argparse.Namespace) -> int:
    files = [_part(part) for part in options.parts]
    _keep(options.output, [file for file, _ in files])
    parts = [(load(file), weight) for file, weight in files]
    title = Path(options.output).stem
    settings = {name: value for name, value in vars(options).items() if name in ("density", "seed")}
    mixed = mix(parts, title, options.operator, **settings)
    mixed = Adapter(mixed.layers, label(mixed.metadata, title=title), title)
    save(mixed, options.output, DTYPES[options.dtype])
    _tell(options, {"parts": [{"name": adapter.name, "weight": weight} for adapter, weight in parts]})
    return 0


def _part(text: str) -> tuple[str, float]:
    """`file:weight`; a colon that no number follows, as in `C:\\style.safetensors`, belongs to the file."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, 1.0)
    except ValueError:
        if Path(file).is_file():
            raise SodaError(f"{text}: {weight!r} is no weight; give a number, as in {file}:0.8") from None
        return text, 1.0


def _keep(output: str, sources: Sequence[str | None]) -> None:
    """Raises SodaFileError if the output is one of the files that it is made from."""
    for source in sources:
        if source and Path(source).exists() and Path(output).exists() and os.path.samefile(source, output):
            raise SodaFileError(f"{output}: the result would replace what it is made from; give another --output")


def _convert(options: argparse.Namespace) -> int:
    source = options.file
    _keep(options.output, [source, options.base, options.onto])
    base = BaseWeights(options.base) if options.base else None
    official = Path(source).suffix.lower() in (".pt", ".pth", ".bin")
    if base is None and (official or options.onto or options.to in ("diff", "lora")):
        raise SodaError(f"{source}: this conversion needs the base weights; give them with --base")
    if options.onto and options.to != "soda":
        raise SodaError(f"{source}: --onto makes an adapter for another base; leave out --to {options.to}")
    if official and base is not None:
        adapter = read_official(source, base, options.decomposition, options.device, _progress())
    else:
        adapter = load(source)
    about = TARGETS[options.to](adapter, base, options)
    _tell(options, about)
    return 0


def _to_soda(adapter: Adapter, base: BaseWeights | None, options: argparse.Namespace) -> dict[str, Any]:
    if all(name.startswith(("unet.", "text_encoder", "down_", "mid_", "up_")) for name in adapter.layers):
        adapter = renamed(adapter, to_comfy)
    about: dict[str, Any] = {"layers": len(adapter.layers)}
    if options.onto and base is not None:
        target = BaseWeights(options.onto)
        adapter, kept = transport(adapter, base, target, target.path.stem, options.device, _progress())
        about["spectrum_kept"] = round(kept, 4)
        if not options.json:
            print(f"{kept:7.1%}  of the spectrum's change has a place in {target.path.name}")
    save(adapter, options.output, DTYPES[options.dtype or "fp32"])
    return about


def _to_diffusers(adapter: Adapter, base: BaseWeights | None, options: argparse.Namespace) -> dict[str, Any]:
    save(renamed(adapter, to_diffusers), options.output, DTYPES[options.dtype or "fp32"])
    return {"layers": len(adapter.layers)}


def _to_difference(adapter: Adapter, base: BaseWeights, options: argparse.Namespace) -> dict[str, Any]:
    return save_difference(adapter, base, options.output, DTYPES[options.dtype or "fp16"], options.device, _progress())


def _to_lora(adapter: Adapter, base: BaseWeights, options: argparse.Namespace) -> dict[str, Any]:
    about = save_lora(
        adapter, base, options.output, options.rank, DTYPES[options.dtype or "fp16"], options.device, _progress()
    )
    if not options.json:
        shares = about["energy_kept_by_layer"]
        for name, share in shares.items():
            print(f"{share:7.1%}  {name}")
        print(f"{about['energy_kept']:7.1%}  of the change's energy is kept by rank {options.rank}, over all layers")
    return about


TARGETS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "soda": _to_soda, "diffusers": _to_diffusers, "diff": _to_difference, "lora": _to_lora,
}  # fmt: skip


def _progress() -> Callable[[int, int], None] | None:
    """A counter for people who wait at a terminal."""

    def show(done: int, of: int) -> None:
        print(f"\r{done} of {of} weights", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None


def _tell(options: argparse.Namespace, about: Mapping[str, object]) -> None:
    size = os.path.getsize(options.output)
    if options.json:
        print(json.dumps({"file": options.output, "bytes": size, **about}))
    else:
        print(f"{options.output}: {size / 1e6:.1f} MB" if size >= 1e5 else f"{options.output}: {size / 1e3:.1f} kB")
