#!/usr/bin/env python3
"""Rewake against llama-server over HTTP: the same file, the same processors, in turns. See NOTES.md. Linux; Python 3.9, nothing else.

    tests/bench/over_http.py MODEL.gguf [PART …]      parts: clients, late; none: both

clients: 16 streams with prompts of 128 tokens, all at once: tokens a second of all together, and when the first text comes.
late: 16 streams run, and a prompt of 2,000 tokens arrives: how long their gaps between two texts become until it has answered.

Ratios are of medians, over --pairs runs of each. llama-server comes from compare-llama.sh, which runs this with HTTP=1.
"""

import argparse, statistics

from peers import ROOT, WORK, Crowd, Stream, alone, gaps, ids, llama, part, rewake

STREAMS = 16


def clients(server, run, args):
    crowd = Crowd()
    streams = [crowd.add(Stream(server.port, ids(128, f"{run} {n}"), args.tokens)) for n in range(STREAMS)]
    crowd.read_until(lambda: False)
    heard = [stream.heard() for stream in streams]
    took = max(times[-1] for times, _ in heard) - streams[0].began
    first = [times[0] - stream.began for stream, (times, _) in zip(streams, heard)]
    tokens = sum(usage["completion_tokens"] for _, usage in heard)
    between = [gap for times, _ in heard for gap in gaps(times)]
    return {
        "tokens/s, all together": tokens / took,
        "first text, median, s": statistics.median(first),
        "first text, last of all, s": max(first),
        "gap, median, ms": 1e3 * statistics.median(between),
    }


def late(server, run, args):
    crowd = Crowd()
    streams = [crowd.add(Stream(server.port, ids(16, f"{run} {n} s"), 1024)) for n in range(STREAMS)]
    crowd.read_until(lambda: all(stream.events >= 40 for stream in streams))
    newcomer = crowd.add(Stream(server.port, ids(args.late, f"{run} late"), 1))
    crowd.read_until(lambda: newcomer.events > 0)
    crowd.leave_all()
    asked, answered = newcomer.began, newcomer.parts[-1][0]
    before, during = [], []
    for times, _ in (stream.heard() for stream in streams):
        # From the 20th on all of them have begun.
        pairs = list(zip(times, times[1:]))[20:]
        before += [b - a for a, b in pairs if b <= asked]
        during += [b - a for a, b in pairs if b > asked and a < answered]
        # One that heard nothing until the end waits still.
        during.append(answered - times[-1]) if answered - times[-1] > 0.5 * (answered - asked) else None
    usual = statistics.median(before)
    return {
        "gap before, median, ms": 1e3 * usual,
        "gap before, p99 / median": part(before, 0.99) / usual,
        "gap meanwhile, median / before": statistics.median(during) / usual,
        "gap meanwhile, p99 / before": part(during, 0.99) / usual,
        "gap meanwhile, longest / before": max(during) / usual,
        "late prompt, first text, s": answered - asked,
    }


PARTS = {"clients": clients, "late": late}


def measured(start, run, args):
    with start() as server:
        # So that no buffer is made and no page is touched for the first time while it counts.
        clients(server, f"warm {run}", argparse.Namespace(tokens=16))
        return {key: value for part in args.parts or PARTS for key, value in PARTS[part](server, run, args).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--rewake", default=str(ROOT / "target/release/rewake"), metavar="FILE")
    parser.add_argument("--llama", default=str(WORK / "build/bin"), metavar="FOLDER", help="'' = Rewake alone")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer in clients")
    parser.add_argument("--late", type=int, default=2000, help="tokens of the prompt that arrives late")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {unknown.pop()}")
    starts = {"Rewake": lambda: rewake(args.rewake, args.model, args.threads)}
    if args.llama:
        starts["llama-server"] = lambda: llama(args.llama, args.model, args.threads, STREAMS + 1)
    told = {name: [] for name in starts}
    for run in range(args.pairs):
        for name, start in starts.items():
            told[name].append(alone(lambda: measured(start, run, args)))
    print(f"{args.model}, {args.pairs} runs of each: median (least … most)")
    print(f"{'':<32}" + "".join(f"{name:>28}" for name in told) + ("   ratio" if args.llama else ""))
    for key in told["Rewake"][0]:
        line, medians = f"{key:<32}", []
        for runs in told.values():
            values = [run[key] for run in runs]
            medians.append(statistics.median(values))
            line += f"{medians[-1]:>10.3f}{f'({min(values):.3f} … {max(values):.3f})':>18}"
        print(line + (f"{medians[0] / medians[1]:>8.2f}" if args.llama else ""))


if __name__ == "__main__":
    main()
