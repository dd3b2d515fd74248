"""Writes an RWKV-7 with the shapes of a real model and random f16 weights.

usage: random_model.py 0.1B|0.4B|1.5B OUT.safetensors
"""

import json
import random
import struct
import sys

# Layers, width, ranks of w, a, v, g.
SIZES = {
    "0.1B": (12, 768, (64, 64, 32, 128)),
    "0.4B": (24, 1024, (64, 64, 32, 128)),
    "1.5B": (24, 2048, (96, 96, 64, 256)),
}
VOCABULARY = 65536
HEAD = 64


def shapes(layers, c, ranks):
    yield "emb.weight", (VOCABULARY, c)
    yield "head.weight", (VOCABULARY, c)
    for name in ("ln_out", "blocks.0.ln0"):
        yield f"{name}.weight", (c,)
        yield f"{name}.bias", (c,)
    for layer in range(layers):
        block = f"blocks.{layer}"
        for name in ("ln1", "ln2", "att.ln_x"):
            yield f"{block}.{name}.weight", (c,)
            yield f"{block}.{name}.bias", (c,)
        for mix in "rwkvag":
            yield f"{block}.att.x_{mix}", (1, 1, c)
        for name, rank in zip("wavg", ranks):
            if name == "v" and layer == 0:
                continue
            yield f"{block}.att.{name}1", (c, rank)
            yield f"{block}.att.{name}2", (rank, c)
            if name != "g":
                yield f"{block}.att.{name}0", (1, 1, c)
        for name in ("k_k", "k_a"):
            yield f"{block}.att.{name}", (1, 1, c)
        yield f"{block}.att.r_k", (c // HEAD, HEAD)
        for name in ("receptance", "key", "value", "output"):
            yield f"{block}.att.{name}.weight", (c, c)
        yield f"{block}.ffn.x_k", (1, 1, c)
        yield f"{block}.ffn.key.weight", (4 * c, c)
        yield f"{block}.ffn.value.weight", (c, 4 * c)


def main():
    size, out = sys.argv[1:]
    tensors, end = {}, 0
    for name, shape in shapes(*SIZES[size]):
        count = 1
        for n in shape:
            count *= n
        tensors[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    # One stretch of random values, from another place each time.
    chance = random.Random(1)
    count = 1 << 20
    values = struct.pack(f"<{count}e", *(chance.gauss(0, 0.02) for _ in range(count)))
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        while end > 0:
            start = 2 * chance.randrange(count // 2)
            part = values[start : start + end]
            file.write(part)
            end -= len(part)


main()
