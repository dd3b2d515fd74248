#!/usr/bin/env python3
"""What is promised beside speed: neighbours, memory, length, drafts. See NOTES.md. Linux; Python 3.9, nothing else.

    tests/bench/limits.py PART [MODEL …]         without a model: the embedded one

neighbour: prompts and answers while another process spins on one processor, against the same without it, for Rewake and for
           llama.cpp (from compare-llama.sh; --llama '' leaves it out).
memory:    what a server holds when it has loaded a file, and held at most on the way, against the weights as they are stored. The
           argument may be FILE or FILE:TYPE, which is loaded with --quantize TYPE.
length:    --tokens through one stream: processor time and memory of each tenth.
drafts:    answers with drafts and without, in turns, over texts that drafts foretell never, half of the time, and always.
"""

import argparse, http.client, json, os, pathlib, statistics, struct, subprocess, sys, time

from peers import ROOT, WORK, Crowd, Stream, alone, ids, rewake


def line(title, values, unit="{:.3f}"):
    text = unit.format
    print(f"  {title:<44}{text(statistics.median(values)):>12}  ({text(min(values))} … {text(max(values))})", flush=True)


class Spinning:
    """A process that never rests, on the last processor, or none."""

    def __init__(self, is_there):
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_there else None
        if self.process:
            os.sched_setaffinity(self.process.pid, {max(os.sched_getaffinity(0))})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()


def output(command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def ours(args, model):
    file = [model] if model else []
    report = json.loads(output([args.rewake, "bench", *file, "--json", "--runs", 1, "--prompt", 128, "--tokens", 16,
                                "--streams", 1, "--threads", args.threads or os.cpu_count()]))
    return dict(zip(("prompt", "one stream"), (of["tokens_per_second"]["median"] for of in report["measurements"])))


def theirs(args, model):
    tests = json.loads(output([f"{args.llama}/llama-bench", "-m", model, "-t", args.threads or os.cpu_count(), "-p", 128, "-n", 16,
                               "-r", 1, "-o", "json"]))
    return {"prompt" if test["n_prompt"] else "one stream": test["avg_ts"] for test in tests}


def neighbour(args, model):
    for name, measure in [("Rewake", ours), *([("llama.cpp", theirs)] if args.llama and model else [])]:
        runs = []
        for _ in range(args.runs):
            pair = []
            for disturbed in (False, True):

                def once():
                    with Spinning(disturbed):
                        return measure(args, model)

                pair.append(alone(once))
            runs.append(pair)
        for work in runs[0][0]:
            for n, title in enumerate(("undisturbed", "beside a spinning process")):
                line(f"{name}, {work}, tokens/s, {title}", [pair[n][work] for pair in runs], "{:.1f}")
            line(f"{name}, {work}, part that is left", [pair[1][work] / pair[0][work] for pair in runs])


def status(server, key):
    text = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(text.split(key + ":")[1].split()[0])


def weights(file):
    """Bytes of all tensors, which lie at the end of a GGUF or safetensors file."""
    with open(file, "rb") as opened:
        start = opened.read(8)
    if file.endswith(".safetensors"):
        return os.path.getsize(file) - 8 - struct.unpack("<Q", start)[0]
    # The vocabulary of a GGUF is a megabyte or two.
    return os.path.getsize(file)


def memory(args, model):
    model, _, kind = (model or "").partition(":")
    loaded = model
    if kind:
        loaded = f"{model}.{kind}.gguf"
        if not os.path.exists(loaded):
            output([args.rewake, "convert", model, loaded, "--type", kind])
    with rewake(args.rewake, model, args.threads, *(["--quantize", kind] if kind else [])) as server:
        ready = status(server, "VmRSS"), status(server, "RssAnon"), status(server, "VmHWM")
        crowd = Crowd()
        for n in range(16):
            crowd.add(Stream(server.port, ids(128, n), 16))
        crowd.read_until(lambda: False)
        after = status(server, "VmRSS"), status(server, "VmHWM")
    stored, held = os.path.getsize(model) and weights(model), weights(loaded)
    mb = lambda n: f"{n / 1e6:.0f} MB"
    print(f"  stored {mb(stored)}" + (f", as {kind} {mb(held)}" if kind else ""))
    print(f"  when ready: resident {mb(ready[0])} ({ready[0] / held:.3f} of what is held), anonymous {mb(ready[1])}")
    print(f"  most on the way: {mb(ready[2])} ({ready[2] / held:.3f} of what is held, {ready[2] / stored:.3f} of what is stored)")
    print(f"  after 16 streams: resident {mb(after[0])}, most {mb(after[1])}")


def length(args, model):
    with rewake(args.rewake, model, args.threads) as server:
        ticks = lambda: sum(map(int, pathlib.Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        stream = Stream(server.port, ids(1, 1) if model else [1], args.tokens)
        # What comes is counted, not kept.
        read, rest, tenth = 0, b"", args.tokens // 10
        before, began = ticks(), time.perf_counter()
        print("  tokens, processor time a token, time a token, resident")
        done = 0
        while data := stream.socket.recv(1 << 16):
            text = rest + data
            read, rest = read + text.count(b'"text":'), text[-6:]
            if read >= (done + 1) * tenth or b"data: [DONE]" in text:
                spent, now = ticks() - before, time.perf_counter()
                part = read - done * tenth
                print(f"  {read:>9} {1e6 * spent / os.sysconf('SC_CLK_TCK') / part:>8.1f} µs {1e6 * (now - began) / part:>8.1f} µs"
                      f" {status(server, 'VmRSS') / 1e6:>8.1f} MB", flush=True)
                done, before, began = done + 1, ticks(), now
                if b"data: [DONE]" in text:
                    break


# The only tokens that are possible: any, one of two by the coin, always the same.
TEXTS = {"any token": {}, "one of two": {"logit_bias": {"100": 100, "200": 100}}, "always the same": {"logit_bias": {"100": 100}}}


DRAFTED = ("rewake_drafted_tokens_total", "rewake_drafted_tokens_accepted_total")


def drafted(server):
    """Tokens that were drafted so far, and those of them that were right."""
    asked = http.client.HTTPConnection("127.0.0.1", server.port)
    asked.request("GET", "/metrics")
    lines = [line.rsplit(" ", 1) for line in asked.getresponse().read().decode().splitlines() if line]
    return [sum(float(n) for name, n in lines if name.split("{")[0] == kind) for kind in DRAFTED]


def drafts(args, model):
    setting = "REWAKE_ENGINE__SPECULATION"
    starts = lambda setting: rewake(args.rewake, model, args.threads, setting=setting)
    with starts(f"{setting}=true") as on, starts(f"{setting}=false") as off:
        for streams in (1, 4):
            for title, text in ((title, TEXTS[title]) for title in args.texts):

                def pair(run):
                    speeds = []
                    for server in (on, off) if run % 2 else (off, on):
                        crowd = Crowd()
                        for n in range(streams):
                            crowd.add(Stream(server.port, ids(8, f"{run} {n}") if model else [1 + n], args.new, seed=run, **text))
                        crowd.read_until(lambda: False)
                        first = min(stream.parts[0][0] for stream in crowd.streams)
                        speeds.append(streams * args.new / (max(stream.parts[-1][0] for stream in crowd.streams) - first))
                    return speeds if run % 2 else speeds[::-1]

                pair(-1)
                before = drafted(on)
                runs = [pair(run) for run in range(args.runs)]
                tokens = args.runs * streams * args.new
                told = [(after - before) / tokens for before, after in zip(before, drafted(on))]
                line(f"{streams} at once, {title}: tokens/s without", [b for _, b in runs], "{:.1f}")
                line(f"{streams} at once, {title}: with / without", [a / b for a, b in runs])
                print(f"    drafted a token {told[0]:.3f}, right {told[1]:.3f}", flush=True)


PARTS = {"neighbour": neighbour, "memory": memory, "length": length, "drafts": drafts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("models", nargs="*", default=[None], metavar="MODEL")
    parser.add_argument("--rewake", default=str(ROOT / "target/release/rewake"), metavar="FILE")
    parser.add_argument("--llama", default=str(WORK / "build/bin"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of length")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="of drafts")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer of drafts")
    args = parser.parse_args()
    for model in args.models:
        print(f"{args.part}: {model or 'the embedded model'}", flush=True)
        PARTS[args.part](args, model)


if __name__ == "__main__":
    main()
