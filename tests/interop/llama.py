"""Compares Rewake with llama.cpp over GGUF files, in both directions, and its other formats with Python's readers.

    python3 -m venv venv && venv/bin/pip install llama-cpp-python gguf numpy safetensors
    cargo build --release
    venv/bin/python tests/interop/llama.py target/release/rewake [--report FILE.md]

It is run by hand: pip builds llama.cpp from its source, which takes minutes. Models are the golden cases of v6 and v7,
the embedded demonstration model, and a random v7 with the World vocabulary. For every type of GGUF

* a file by `rewake convert`, and one by llama.cpp's own quantiser, are read by both programs;
* llama.cpp writes 64 tokens greedily, and both give the logits of every position of that text;
* the same file, unpacked to float32 by the Python package `gguf`, is read by llama.cpp once more.

The last is the strict comparison. llama.cpp rounds activations to f16, bf16 or 8 bits where weights are of such types,
and Rewake computes with f32 activations whatever the weights are, so their logits differ by that rounding.

The exit status is 0 when all of these hold; errors are the largest of any logit, in parts of the RMS of all logits:

* f32, and every file against its unpacked form: at most 1e-3, and the likeliest token is the same at every position
  where the two likeliest are further apart than twice that error;
* as they are: f16 2e-2, bf16 0.1, quantised 0.3;
* llama.cpp's greedy text is Rewake's: the same tokens for f32, and else the same up to the first position where the two
  candidates are closer in Rewake's logits than twice the error there;
* llama.cpp makes of texts the World ids that the original tokenizer makes, from the vocabulary in the file;
* `.safetensors` and `.pth` hold what the original holds, for the package `safetensors`, for a reader of pickles that
  knows nothing but tensors, and for PyTorch where it is installed.
"""

import argparse
import ctypes
import json
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
import safetensors
from gguf import GGMLQuantizationType as Type

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
# llama.cpp's names for what it quantises most tensors to.
QUANTISER = {"q4_k": "Q4_K_M", "q5_k": "Q5_K_M"}
TOLERANCE = {"f32": 1e-3, "f16": 2e-2, "bf16": 0.1}
QUANTISED, STRICT = 0.3, 1e-3
GENERATED = 64


# llama.cpp


@llama.llama_log_callback
def on_log(level, text, _):
    # Errors only.
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class Judge:
    """A GGUF file in llama.cpp."""

    def __init__(self, path):
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert self.model, f"llama.cpp refuses {path}"
        self.vocabulary = llama.llama_model_get_vocab(self.model)
        self.size = llama.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        llama.llama_model_free(self.model)

    def context(self, length):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(512, length), 512, 512
        params.n_threads = params.n_threads_batch = 2
        return llama.llama_init_from_model(self.model, params)

    def step(self, context, tokens, at):
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        rows = [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (self.size,)).copy()
            for i in range(len(tokens))
        ]
        llama.llama_batch_free(batch)
        return rows

    def logits(self, tokens):
        context = self.context(len(tokens))
        rows = self.step(context, tokens, 0)
        llama.llama_free(context)
        return np.stack(rows)

    def greedy(self, prompt, count):
        """The prompt with `count` tokens after it, each the likeliest, and the logits after each but the last."""
        tokens, context = list(prompt), self.context(len(prompt) + count)
        rows = self.step(context, tokens, 0)
        while True:
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) == len(prompt) + count:
                break
            rows += self.step(context, tokens[-1:], len(tokens) - 1)
        llama.llama_free(context)
        return tokens, np.stack(rows)

    def encode(self, text):
        text = text.encode()
        ids = (llama.llama_token * (len(text) + 8))()
        return list(ids[: llama.llama_tokenize(self.vocabulary, text, len(text), ids, len(ids), False, False)])

    def decode(self, ids):
        pieces = b""
        for token in ids:
            piece = ctypes.create_string_buffer(512)
            length = llama.llama_token_to_piece(self.vocabulary, token, piece, 512, 0, False)
            pieces += piece.raw[:length]
        return pieces


def quantise(path, kind, out):
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{QUANTISER.get(kind, kind.upper())}")
    assert llama.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params)) == 0


def unpack(path, out):
    """Writes a GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        value, array = field.contents(), field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value, field.types[0], field.types[-1] if array else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, values(tensor), raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values(tensor):
    shape = [int(n) for n in reversed(tensor.shape)]
    return np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)


# Rewake


class Rewake:
    def __init__(self, binary, scratch):
        self.binary, self.scratch = binary, scratch

    def run(self, *args):
        done = subprocess.run([self.binary, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, f"{args}: {done.stderr}"
        return done.stdout

    def convert(self, source, target, *more):
        self.run("convert", source, target, *more)
        return target

    def logits(self, path, tokens):
        ids, out = self.scratch / "ids.json", self.scratch / "logits.safetensors"
        ids.write_text(json.dumps(tokens))
        self.run("logits", path, "--tokens", ids, "--out", out)
        with safetensors.safe_open(out, "numpy") as file:
            return file.get_tensor("logits")


# Models


def random_v7(path, seed=7):
    """A v7 of two layers, width 256 and the World vocabulary in f16, whose numbers are of the size of a trained one's."""
    rng, width, heads, hidden, vocabulary, rank = np.random.default_rng(seed), 256, 4, 512, 65536, 32
    tensors = {}

    def matrix(name, rows, cols, scale=None):
        tensors[name] = rng.normal(0, scale or cols**-0.5, (rows, cols))

    def vector(name, low, high, shape=(1, 1, width)):
        tensors[name] = rng.uniform(low, high, shape)

    def norm(name):
        vector(f"{name}.weight", 0.8, 1.2, (width,))
        vector(f"{name}.bias", -0.1, 0.1, (width,))

    matrix("emb.weight", vocabulary, width, 1.0)
    matrix("head.weight", vocabulary, width, 2 * width**-0.5)
    norm("ln_out")
    norm("blocks.0.ln0")
    for layer in range(2):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        norm(f"blocks.{layer}.ln1")
        norm(f"blocks.{layer}.ln2")
        norm(f"{att}ln_x")
        for name in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"]:
            vector(att + name, 0, 1)
        for name, low, high in [("w", -6, 0), ("a", -1, 1), ("v", -1, 1)]:
            vector(f"{att}{name}0", low, high)
            matrix(f"{att}{name}1", width, rank, width**-0.5)
            matrix(f"{att}{name}2", rank, width, 0.5 * rank**-0.5)
        matrix(f"{att}g1", width, 2 * rank, width**-0.5)
        matrix(f"{att}g2", 2 * rank, width)
        vector(f"{att}k_k", 0.5, 1)
        vector(f"{att}k_a", 0.8, 1.2)
        vector(f"{att}r_k", -0.2, 0.2, (heads, width // heads))
        for name in ["receptance", "key", "value", "output"]:
            matrix(f"{att}{name}.weight", width, width)
        vector(f"{ffn}x_k", 0, 1)
        matrix(f"{ffn}key.weight", hidden, width)
        matrix(f"{ffn}value.weight", width, hidden)
    from safetensors.numpy import save_file

    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, path)


def models(scratch):
    """Name, file, and the ids that a text begins with."""
    for name in ["v6_bf16", "v7_bf16"]:
        yield name, DATA / name / "model.safetensors", json.loads((DATA / name / "case.json").read_text())["tokens"][:48]
    demo = json.loads((DATA / "demo/expected.json").read_text())
    yield "demo", ROOT / "assets/demo/model.safetensors", demo["prompt_ids"]
    random_v7(scratch / "world.safetensors")
    yield "world", scratch / "world.safetensors", samples()[0]["ids"] + samples()[2]["ids"]


def samples():
    return json.loads((DATA / "text/world_tokenizer.json").read_text())


# Comparisons


class Report:
    def __init__(self):
        self.lines, self.failures = [], []

    def say(self, line=""):
        self.lines.append(line)
        print(line, flush=True)

    def hold(self, what, holds, found=""):
        if not holds:
            self.failures.append(f"{what}: {found}")
            self.say(f"FAILED {what}: {found}")


def errors(one, other):
    """The largest error at each position, in parts of the RMS of all."""
    return np.abs(one - other).max(axis=1) / np.sqrt((other.astype(np.float64) ** 2).mean())


def same_top(one, other, room):
    """Positions where the likeliest token differs though it is ahead by more than `room`."""
    rms = np.sqrt((other.astype(np.float64) ** 2).mean())
    rows = np.arange(len(other))
    behind = (other.max(axis=1) - other[rows, one.argmax(axis=1)]) / rms
    return int((behind > room).sum())


def first_difference(tokens, ours, begin):
    """Where greedy decoding by `ours` first leaves `tokens`, as (tokens that are the same, margin); None = nowhere."""
    rms = np.sqrt((ours.astype(np.float64) ** 2).mean())
    for n, (token, row) in enumerate(zip(tokens[begin:], ours[begin - 1 :])):
        if row.argmax() != token:
            return n, float((row.max() - row[token]) / rms)
    return None


def weight_error(path, exact):
    """How far the large matrices are from those of the f32 file: RMS of the differences in parts of their RMS."""
    reader, wrong, all_ = gguf.GGUFReader(path), 0.0, 0.0
    for tensor in reader.tensors:
        if tensor.tensor_type != Type.F32:
            difference = values(tensor) - exact[tensor.name]
            wrong += float((difference.astype(np.float64) ** 2).sum())
            all_ += float((exact[tensor.name].astype(np.float64) ** 2).sum())
    return (wrong / all_) ** 0.5 if all_ else 0.0


def compare(report, rewake, row, path, prompt, exact):
    """One line of the table."""
    model, kind, writer = row
    what = f"{model} {kind} by {writer}"
    held = sorted({t.tensor_type.name for t in gguf.GGUFReader(path).tensors} - {"F32"}) or ["F32"]
    with Judge(path) as judge:
        tokens, theirs = judge.greedy(prompt, GENERATED)
        whole = errors(judge.logits(tokens[:-1]), theirs).max()
    ours = rewake.logits(path, tokens[:-1])
    found = errors(theirs, ours)
    most = TOLERANCE.get(kind, QUANTISED)
    report.hold(f"{what}: logits", found.max() <= most, f"{found.max():.1e} > {most}")
    left = first_difference(tokens, ours, len(prompt))
    if left is not None:
        place, margin = left
        near = margin <= 2 * found[len(prompt) - 1 + place] and kind != "f32"
        report.hold(f"{what}: greedy", near, f"the text differs after {place} tokens by a margin of {margin:.1e}")
    strict = found
    if kind != "f32":
        flat = rewake.scratch / "unpacked.gguf"
        unpack(path, flat)
        with Judge(flat) as judge:
            exactly = judge.logits(tokens[:-1])
        flat.unlink()
        strict = errors(exactly, ours)
        report.hold(f"{what}: unpacked", strict.max() <= STRICT, f"{strict.max():.1e} > {STRICT}")
        different = same_top(exactly, ours, 2 * strict.max())
        report.hold(f"{what}: unpacked, likeliest tokens", different == 0, f"{different} differ")
    top = int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
    text = f"{GENERATED} equal" if left is None else f"{left[0]} equal, then a margin of {left[1]:.1e}"
    cells = [model, kind, writer, ", ".join(held), f"{weight_error(path, exact):.1e}", f"{strict.max():.1e}"]
    cells += [f"{found.max():.1e}", f"{whole:.1e}", f"{top} of {len(ours)}", text]
    report.say(f"| {' | '.join(cells)} |")


def table(report, rewake, name, source, prompt):
    base = rewake.convert(source, rewake.scratch / "f32.gguf", "--type", "f32")
    exact = {tensor.name: values(tensor) for tensor in gguf.GGUFReader(base).tensors}
    for kind in TYPES:
        ours, theirs = rewake.scratch / f"{kind}.gguf", rewake.scratch / "llama.gguf"
        rewake.convert(source, ours, "--type", kind)
        compare(report, rewake, (name, kind, "Rewake"), ours, prompt, exact)
        if kind != "f32":
            quantise(base, kind, theirs)
            compare(report, rewake, (name, kind, "llama.cpp"), theirs, prompt, exact)


def texts(report, path):
    """What llama.cpp makes of texts with the vocabulary that stands in the file."""
    with Judge(path) as judge:
        for sample in samples():
            ids = judge.encode(sample["text"])
            report.hold(f"World ids of {sample['text'][:40]!r}", ids == sample["ids"], ids[:20])
            text = judge.decode(sample["ids"])
            report.hold(f"text of the ids of {sample['text'][:40]!r}", text == sample["text"].encode(), text[:80])
    report.say(f"World vocabulary: {len(samples())} texts to ids and back.")


# The other formats


class Pickled(pickle.Unpickler):
    """A state dict as PyTorch pickles it, from a zip archive; anything else is refused."""

    KINDS = {"FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2"}

    def __init__(self, archive, root):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if module == "torch" and name in self.KINDS:
            return self.KINDS[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, identity):
        tag, kind, key, place, count = identity
        assert (tag, place) == ("storage", "cpu"), identity
        storage = np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), kind)
        assert len(storage) == count, identity
        return storage

    @staticmethod
    def tensor(storage, offset, shape, strides, gradient, hooks):
        assert (gradient, hooks) == (False, {}) and len(shape) == len(strides)
        assert all(strides[d] == np.prod(shape[d + 1 :], dtype=int) for d in range(len(shape)))
        return storage[offset : offset + np.prod(shape, dtype=int)].reshape(shape)


def bits(path):
    """Name → bytes and shape of the tensors of a safetensors file."""
    return {name: (bytes(t["data"]), tuple(t["shape"])) for name, t in safetensors.deserialize(path.read_bytes())}


def python_readers(report, rewake, source):
    original, name = bits(source), source.parent.name
    pth = rewake.convert(source, rewake.scratch / "out.pth")
    with zipfile.ZipFile(pth) as archive:
        assert archive.testzip() is None
        root = archive.namelist()[0].split("/")[0]
        read = Pickled(archive, root).load()
    found = {name: (tensor.tobytes(), tensor.shape) for name, tensor in read.items()}
    report.hold(f"{name} as .pth", found == original)
    back = bits(rewake.convert(pth, rewake.scratch / "out.safetensors"))
    report.hold(f"{name} as .safetensors", back == original)
    try:
        import torch
    except ImportError:
        return "without PyTorch"
    read = torch.load(pth, weights_only=True)
    found = {n: (t.contiguous().view(torch.uint8).numpy().tobytes(), tuple(t.shape)) for n, t in read.items()}
    report.hold(f"{name} as .pth in PyTorch", found == original)
    return f"with PyTorch {torch.__version__}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("rewake", type=Path, help="the binary")
    arguments.add_argument("--only", metavar="MODEL", help="only this one of v6_bf16, v7_bf16, demo, world")
    arguments.add_argument("--report", type=Path, help="write the tables to this file")
    arguments = arguments.parse_args()
    llama.llama_log_set(on_log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        rewake = Rewake(arguments.rewake.resolve(), Path(scratch))
        report.say(
            "| model | type | written by | types in the file | error of the weights | unpacked | as it is "
            "| llama.cpp, one by one and at once | same likeliest token | greedy text |"
        )
        report.say("|---|---|---|---|---|---|---|---|---|---|")
        for name, source, prompt in models(rewake.scratch):
            if arguments.only in (None, name):
                table(report, rewake, name, source, prompt)
        report.say()
        texts(report, rewake.convert(rewake.scratch / "world.safetensors", rewake.scratch / "texts.gguf"))
        cases = [DATA / name / "model.safetensors" for name in ["v1_fp32", "v4_bf16", "v5_0_fp16", "v6_bf16", "v7_bf16"]]
        how = [python_readers(report, rewake, case) for case in cases][0]
        report.say(f".pth and .safetensors: {len(cases)} models read back in Python, {how}.")
    report.say(f"FAILED: {len(report.failures)}" if report.failures else "PASSED")
    if arguments.report:
        arguments.report.write_text("\n".join(report.lines) + "\n")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
