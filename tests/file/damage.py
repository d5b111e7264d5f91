"""Ways to damage a SODA file. Each takes (header, body, chance) of a good one and returns the bytes of a bad one."""

import io
import json
import os
import pickle
import random
import struct
import zipfile

NAN, INF = float("nan"), float("inf")


class Bomb:
    """Unpickled, it leaves a trace in the current folder."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def good(seed=1):
    """(header, body) of a file with layers of three forms, as plain JSON and bytes; the numbers depend on the seed."""
    chance = random.Random(seed)
    tensors = {}
    forms = ("a.to_q", "lq", (3, 6)), ("a.to_k[8:16]", "svd", (1, 6, 10)), ("b.to_out.0", None, (15,))
    for layer, part, factors in forms:
        if part:
            tensors[f"{layer}.soda_{part}"] = [7 if part == "lq" else 12]
            tensors[f"{layer}.soda_sketch"] = [8, 8]
        tensors |= {f"{layer}.soda_log_R{j}": [numbers] for j, numbers in enumerate(factors)}
    header = {"__metadata__": {"soda.format_version": "1", "soda.role": "style"}}
    body = b""
    for name, shape in tensors.items():
        count = shape[0] * (8 if len(shape) == 2 else 1)
        data = struct.pack(f"<{count}f", *(chance.uniform(-0.3, 0.3) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def pack(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def some(header, chance):
    return chance.choice([name for name in header if name != "__metadata__"])


def rename(header, old, new):
    return {new if name == old else name: entry for name, entry in header.items()}


def truncated(h, b, chance):
    data = pack(h, b)
    return data[: chance.randrange(len(data))]


def trailing(h, b, chance):
    return pack(h, b) + bytes(chance.randrange(256) for _ in range(chance.randint(1, 40)))


def header_length(h, b, chance):
    data = pack(h, b)
    true = struct.unpack("<Q", data[:8])[0]
    lies = [0, 1, true - 1, true + 1, true + len(b), 8 << 20, 100_000_000, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    return struct.pack("<Q", chance.choice(lies)) + data[8:]


def header_bytes(h, b, chance):
    data = bytearray(pack(h, b))
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(8, len(data) - len(b))] = chance.randrange(256)
    return bytes(data)


def header_pieces(h, b, chance):
    """JSON of the right length with a piece moved, dropped or replaced by a token."""
    text = json.dumps(h).encode()
    at, length = chance.randrange(len(text)), chance.randint(1, 30)
    tokens = [b"", b"null", b"{", b"}", b"[[[[", b'"', b"1e999", b"\xff\xfe", b"\\u0000", b"\n", b"NaN", text[at:][:40]]
    return pack(text[:at] + chance.choice(tokens) + text[at + length :], b)


def body_floats(h, b, chance):
    """Numbers that are no numbers."""
    data, at = bytearray(b), 4 * chance.randrange(len(b) // 4)
    data[at : at + 4] = struct.pack("<f", chance.choice([NAN, INF, -INF]))
    return pack(h, bytes(data))


def body_bytes(h, b, chance):
    data = bytearray(b)
    for _ in range(chance.randint(1, 20)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return pack(h, bytes(data))


def huge_claims(h, b, chance):
    entry = h[some(h, chance)]
    big = chance.choice([2**24 + 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
    entry["shape"] = chance.choice([[big], [big, big], [big, 8], [8, big], [1] * 1000 + [big], [0, big]])
    if chance.random() < 0.5:
        entry["data_offsets"][1] = entry["data_offsets"][0] + 4 * big
    return pack(h, b)


def offsets(h, b, chance):
    entry = h[some(h, chance)]
    start, end = entry["data_offsets"]
    entry["data_offsets"] = chance.choice(
        [[end, start - 1], [start + 1, end + 1], [start, end + 4], [start - 4, end], [-4, end], [start],
         [start, end, end], [float(start), end + 0.5], ["0", "4"], None, [start, len(b) * 2], [2**64, 2**64 + 4], {}]
    )  # fmt: skip
    return pack(h, b)


def duplicate_keys(h, b, chance):
    """The same name twice, with other data or other types the second time."""
    name, other = some(h, chance), some(h, chance)
    entry = dict(h[other if other != name else name])
    entry["dtype"] = chance.choice(["F32", "F16", "I32"]) if other != name else "I32"
    text = json.dumps(h)
    return pack((text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode(), b)


def missing_keys(h, b, chance):
    """A rotation without its first factor, with the bytes taken out too; or an entry without one of its fields."""
    if chance.random() < 0.5:
        del h[some(h, chance)][chance.choice(["dtype", "shape", "data_offsets"])]
        return pack(h, b)
    name = chance.choice([name for name in h if name.endswith("log_R0") and "b.to_out" not in name])
    start, end = h.pop(name)["data_offsets"]
    for entry in h.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return pack(h, b[:start] + b[end:])


def types(h, b, chance):
    """Types of the same width, of another width, and of no meaning."""
    known = ["I32", "U32", "C64", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"]
    h[some(h, chance)]["dtype"] = chance.choice([*known, "F128", "f32", "", "float32", 32, None, ["F32"]])
    return pack(h, b)


def shapes(h, b, chance):
    name = some(h, chance)
    count = 1
    for size in h[name]["shape"]:
        count *= size
    wrong = [[1, count], [count, 1], [count, 1, 1], [count + 1], [], [-count], [count, 0], ["8", "8"], 8, None, [0.5]]
    h[name]["shape"] = chance.choice(wrong)
    return pack(h, b)


def not_triangular(h, b, chance):
    """Two neighbouring tensors share their numbers otherwise."""
    first, second = chance.choice(
        [("a.to_q.soda_log_R0", "a.to_q.soda_log_R1"), ("a.to_k[8:16].soda_log_R1", "a.to_k[8:16].soda_log_R2")]
    )
    first, second = h[first], h[second]
    moved = chance.choice([-2, -1, 1, 2])
    first["shape"], second["shape"] = [first["shape"][0] + moved], [second["shape"][0] - moved]
    first["data_offsets"][1] += 4 * moved
    second["data_offsets"][0] += 4 * moved
    return pack(h, b)


def strange_parts(h, b, chance):
    """Parts that the format does not have."""
    parts = ["soda_lu", "soda_log_R5", "soda_log_R9", "soda_log_R10", "soda_log_R-1", "soda_log_R", "soda_log_R\u0662",
             "soda_LQ", "soda_lq ", "soda_lq\n", "soda_log_R0\n", "alpha", "lora_up.weight", "soda_", "",
             "__metadata__", "soda_lq.x"]  # fmt: skip
    old = chance.choice([name for name in h if name.startswith("a.to_q.") and "sketch" not in name])
    return pack(rename(h, old, "a.to_q." + chance.choice(parts)), b)


def strange_layers(h, b, chance):
    """Layer names that are paths, code, endless or not printable: they stay mere names."""
    names = ["../../../etc/passwd", "/etc/passwd", "C:\\Windows\\x", "a\0b", "a\nb", "\x1b[31m", "", ".", "..", " ",
             "__class__", "%s%n{0.__class__}", "x" * 100_000, "\u202egnp", "\U0001f600", "a.soda_lq", "[0:1]", "a[5:2]",
             "~", "$HOME"]  # fmt: skip
    layer, new = chance.choice(["a.to_q", "a.to_k[8:16]", "b.to_out.0"]), chance.choice(names)
    for name in [name for name in h if name.startswith(layer + ".")]:
        h = rename(h, name, new + name[len(layer) :])
    return pack(h, b)


def strange_metadata(h, b, chance):
    h["__metadata__"] = chance.choice(
        [{"soda.format_version": "2"}, {"soda.format_version": ""}, {"soda.format_version": 1}, {"a": None},
         {"soda.format_version": "1\n"}, {"soda.format_version": "9" * 10_000}, [], "1", None, 0, {"a": ["b"]},
         {"a": {"b": "c"}}]
    )  # fmt: skip
    return pack(h, b)


def layer_pieces(h, b, chance):
    """Layers without a rotation, with two spectra, or with a spectrum longer than what they turn."""
    change = chance.randrange(3)
    if change == 0:
        return pack(rename(h, "b.to_out.0.soda_log_R0", "b.to_out.0.soda_qr"), b)
    if change == 1:
        return pack(rename(h, "a.to_q.soda_log_R1", "a.to_q.soda_svd"), b)
    return pack(rename(rename(h, "a.to_q.soda_log_R0", "c"), "c", "a.to_q.soda_qr"), b)


def nested(h, b, chance):
    depth = chance.choice([10, 200, 100_000])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return pack(b'{"x":' + opening * depth + b"0" + closing * depth + b"}", b)


def holes(h, b, chance):
    """Bytes that belong to no tensor, in front, between two or at the end of what the header knows."""
    name = some(h, chance)
    at, gap = h[name]["data_offsets"][0], chance.randint(1, 64)
    for entry in h.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [offset + gap for offset in entry["data_offsets"]]
    return pack(h, b[:at] + bytes(gap) + b[at:])


def overlaps(h, b, chance):
    """Two tensors on the same bytes; with or without the bytes that nobody reads any more."""
    names = [name for name in h if name != "__metadata__"]
    first, second = chance.sample(names, 2)
    start = h[first]["data_offsets"][0] + chance.choice([0, 4])
    length = h[second]["data_offsets"][1] - h[second]["data_offsets"][0]
    h[second]["data_offsets"] = [start, start + length]
    return pack(h, b if chance.random() < 0.5 else b[: max(e["data_offsets"][1] for n, e in h.items() if n in names)])


def invalid_utf8(h, b, chance):
    text = json.dumps(h).encode()
    at = chance.randrange(1, len(text))
    bad = [b"\xff", b"\xc3(", b"\xe2\x28\xa1", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"]
    return pack(text[:at] + chance.choice(bad) + text[at:], b)


def pickles(h, b, chance):
    """What torch.save and pickle write, and archives, whole or cut, under a safetensors name."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(), 2))
        file.writestr("archive/data/0", b)
    data = chance.choice([archive.getvalue(), *(pickle.dumps(Bomb(), protocol) for protocol in range(6))])
    if chance.random() < 0.3:
        return struct.pack("<Q", len(data)) + data + b
    return data[: chance.randint(1, len(data))] + b if chance.random() < 0.3 else data + b


def twice(h, b, chance):
    """Two kinds of damage on top of each other, as far as the first leaves a header."""
    first, second = chance.sample([types, shapes, offsets, huge_claims, strange_metadata], 2)
    data = first(h, b, chance)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    try:
        return second(header, data[8 + length :], chance)
    except (TypeError, IndexError, KeyError, ValueError):  # the second meets what the first put there
        return data


def other_formats(h, b, chance):
    starts = [b"PK\x03\x04", b"\x80\x04\x95", b"GGUF\x03\0\0\0", b"\x89PNG\r\n", b"{", b"\x1f\x8b", b"<html>", b"\0"]
    return chance.choice(starts) + bytes(chance.randrange(256) for _ in range(chance.randrange(400)))


ALWAYS_BAD = [
    truncated, trailing, header_length, body_floats, huge_claims, duplicate_keys, missing_keys, types, shapes,
    not_triangular, strange_parts, layer_pieces, nested, holes, overlaps, invalid_utf8, pickles, other_formats,
]  # fmt: skip
SOMETIMES_BAD = [header_bytes, header_pieces, body_bytes, offsets, strange_layers, strange_metadata, twice]
