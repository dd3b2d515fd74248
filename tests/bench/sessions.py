#!/usr/bin/env python3
"""What sessions cost, asked of a server over HTTP as a client would. See NOTES.md. Linux; Python 3.9, nothing else.

    cargo build --release && tests/bench/sessions.py              # everything, some ten minutes and 6 GB of disk
    tests/bench/sessions.py histories --lengths 100 10000         # one of: histories stored open chats prompt

histories: turn, resume, fork, rewind and save behind histories of different lengths, in a folder on a disk and in the same
folder on a file system in memory (--tmpfs), where fsync costs nothing; and reading the history again.
stored: many sessions on disk, and a server that starts over them. open: the same number in memory only.
chats: whole transcripts, turn by turn, with the prefix cache and without, in turns. prompt: one new long prompt, likewise.
"""

import argparse, http.client, json, os, pathlib, random, shutil, statistics, subprocess, sys, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHUNK = 2000
NO_CACHE = "[prefix_cache]\nenabled = false\n"


def ids(count, seed=0):
    """Any tokens; what they say does not matter."""
    rng = random.Random(seed)
    return [rng.randrange(1, 2000) for _ in range(count)]


def ms(seconds):
    return f"{1000 * seconds:.2f} ms"


def spread(times):
    """The median, and the middle eight tenths."""
    times = sorted(times)
    tenth = len(times) // 10
    return f"{ms(statistics.median(times))} ({ms(times[tenth])} to {ms(times[-1 - tenth])})"


class Client:
    """One connection that is kept open."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def send(self, method, path, body):
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, {"content-type": "application/json"})
        return self.connection.getresponse()

    def ask(self, method, path, body=None):
        reply = self.send(method, path, body)
        text = reply.read()
        assert reply.status == 200, (path, reply.status, text[:500])
        return json.loads(text) if text[:1] in b"{[" else text.decode()

    def timed(self, method, path, body=None):
        began = time.perf_counter()
        self.ask(method, path, body)
        return time.perf_counter() - began

    def first_text(self, path, body):
        """From the request to the first text, and the chunks."""
        began = time.perf_counter()
        reply = self.send("POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}})
        assert reply.status == 200, (path, reply.status, reply.read()[:500])
        first, chunks = None, []
        for line in reply:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                chunks.append(chunk)
                choice = (chunk["choices"] or [{}])[0]
                said = choice.get("text") or choice.get("delta", {}).get("content") or choice.get("finish_reason")
                if said and first is None:
                    first = time.perf_counter() - began
        return first, chunks


class Server:
    """A process that is ready."""

    def __init__(self, args, folder, config="", model=None):
        file = tempfile.NamedTemporaryFile("w", suffix=".toml")
        served = f'[[model]]\nfile = "{model}"\ntokenizer = "world"\n' if model else ""
        file.write(f'[states]\ndir = "{folder}"\n{config}{served}')
        file.flush()
        env = {name: value for name, value in os.environ.items() if not name.startswith("REWAKE_")}
        command = [args.binary, "serve", "--port", "0", "--config", file.name]
        began = time.perf_counter()
        self.process = subprocess.Popen(command, env={**env, "REWAKE_LOG": "error"}, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if "is serving on http://" in line:
                break
        else:
            sys.exit("the server ended before it was ready")
        self.started = time.perf_counter() - began
        self.port = int(line.rsplit(":", 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def client(self):
        return Client(self.port)

    def resident(self):
        """Bytes that the process holds, without mapped files."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def metric(self, name):
        lines = [line for line in self.client().ask("GET", "/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def completion(state, new, **more):
    return {"state_id": state, "prompt": new, "max_tokens": 1, "store_state": False, **more}


def build(client, length):
    """A session whose head has read about that many tokens, in turns; gives its head and the time it took."""
    read, began = 0, time.perf_counter()
    while read < length:
        new = min(CHUNK, length - read)
        body = {"session_id": "long", "prompt": ids(new, read), "max_tokens": 1, "logit_bias": {"0": -100}}
        state = client.ask("POST", "/v1/completions", body)["state"]
        read += new
    return state, time.perf_counter() - began


def costs(server, args, place):
    """Each operation behind the history that is there, by turns so that all see the same machine."""
    client = server.client()
    first = client.timed("GET", "/v1/sessions/long")
    head = client.ask("GET", "/v1/sessions/long")
    measured = {name: [] for name in ["resume, first text", "turn, stored", "turn, not stored", "save", "fork", "rewind"]}
    stem = f"{place}:{os.getpid()}"
    for n in range(args.times + 2):
        new, fork = ids(10, n), {"to": f"{stem}:{n}"}
        one = {"resume, first text": client.first_text("/v1/completions", completion(head["head"], new))[0]}
        one["fork"] = client.timed("POST", "/v1/sessions/long/fork", fork)
        one["turn, not stored"] = client.timed("POST", "/v1/completions", completion(head["head"], new))
        spent = server.metric("rewake_state_store_duration_seconds_sum")
        turn = {"session_id": fork["to"], "prompt": new, "max_tokens": 1}
        one["turn, stored"] = client.timed("POST", "/v1/completions", turn)
        one["save"] = server.metric("rewake_state_store_duration_seconds_sum") - spent
        one["rewind"] = client.timed("POST", f"/v1/sessions/{fork['to']}/rewind", {"at": head["head"]})
        # The first two warm caches and threads.
        for name, value in one.items() if n > 1 else []:
            measured[name].append(value)
    print(f"  {place}: {head['tokens']} tokens in {head['turn']} turns; first look at the session {ms(first)}")
    for name, times in measured.items():
        print(f"    {name}: {spread(times)}")


def histories(args):
    for length in args.lengths:
        print(f"history of {length} tokens")
        with tempfile.TemporaryDirectory(dir=args.tmpfs) as fast, tempfile.TemporaryDirectory(dir=args.disk) as slow:
            with Server(args, fast, NO_CACHE) as server:
                client = server.client()
                state, took = build(client, length)
                print(f"  read in turns of {CHUNK}: {took:.3f} s; a state is {state['bytes']} bytes")
                if length <= 100_000:
                    body = {"prompt": ids(length + 10), "max_tokens": 1}
                    times = [client.first_text("/v1/completions", body)[0] for _ in range(5)]
                    print(f"  read again, first text: {spread(times)}")
            shutil.copytree(fast, slow, dirs_exist_ok=True)
            os.sync()
            for place, folder in [("disk", slow), ("memory", fast)]:
                with Server(args, folder, NO_CACHE) as server:
                    costs(server, args, place)


def fill(server, count):
    """That many sessions of one turn, by 16 clients."""

    def some(k):
        client = server.client()
        for n in range(k, count, 16):
            body = {"session_id": f"s{n}", "prompt": ids(8, n), "max_tokens": 1}
            client.ask("POST", "/v1/completions", body)

    threads = [threading.Thread(target=some, args=(k,)) for k in range(16)]
    began = time.perf_counter()
    [t.start() for t in threads]
    [t.join() for t in threads]
    return time.perf_counter() - began


def forget(folder):
    """Puts the folder's files out of the page cache."""
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resumed(client, numbers):
    """First texts of turns of these sessions."""
    path = "/v1/completions"
    body = {"prompt": ids(10), "max_tokens": 1, "store_state": False}
    heads = [client.ask("GET", f"/v1/sessions/s{n}")["head"] for n in numbers]
    return spread([client.first_text(path, {**body, "state_id": head})[0] for head in heads])


def stored(args):
    print(f"{args.sessions} sessions on disk")
    some = random.Random(1).sample(range(args.sessions), 50)
    with tempfile.TemporaryDirectory(dir=args.disk) as empty, tempfile.TemporaryDirectory(dir=args.disk) as full:
        with Server(args, full, NO_CACHE) as server:
            before = server.resident()
            took = fill(server, args.sessions)
            grown = server.resident() - before
            print(f"  made in {took:.0f} s; the process grew by {grown / 1e6:.1f} MB, {grown / args.sessions:.0f} bytes a session")
        for name, folder in [("nothing stored", empty), ("all stored", full)] * 3:
            forget(folder)
            with Server(args, folder, NO_CACHE) as server:
                ready, rss = server.started, server.resident()
                text = f"  {name}: ready after {ms(ready)}, {rss / 1e6:.1f} MB resident"
                if folder == full:
                    client = server.client()
                    head = client.ask("GET", f"/v1/sessions/s{some[0]}")["head"]
                    first = client.first_text("/v1/completions", completion(head, ids(10)))[0]
                    page = client.timed("GET", "/v1/sessions?limit=20")
                    text += f"; first resume {ms(first)}, others {resumed(client, some)}; a page of the list {ms(page)}"
                    text += f"; then {server.resident() / 1e6:.1f} MB"
                print(text)


def opened(args):
    print(f"{args.sessions} sessions in memory")
    some = random.Random(1).sample(range(args.sessions), 50)
    with Server(args, ":memory:", NO_CACHE) as server:
        client = server.client()
        fill(server, 64)
        before, few = server.resident(), resumed(client, range(50))
        # As many states again: a second one of each of the first 64.
        took = fill(server, args.sessions)
        grown = server.resident() - before
        size = client.ask("GET", f"/v1/sessions/s{some[0]}")["bytes"]
        print(f"  made in {took:.0f} s; {before / 1e6:.0f} MB before, {(before + grown) / 1e6:.0f} MB after")
        print(f"  {grown / args.sessions:.0f} bytes a state, of {size}")
        print(f"  resume with 64 sessions {few}, with all {resumed(client, some)}")


def words(count, seed):
    return "".join(f"word{(seed * 31 + n * n) % 97} " for n in range(count))


def converse(client, chat, told):
    """One chat that no other one shares more with than its system message."""
    messages = [{"role": "system", "content": words(60, 0)}]
    for turn in range(8):
        messages.append({"role": "user", "content": f"{chat} {turn} {words(60, 8 * chat + turn)}"})
        body = {"messages": messages, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "seed": chat}
        first, chunks = client.first_text("/v1/chat/completions", body)
        usage = chunks[-1]["usage"]
        told.append((turn, first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
        deltas = [choice.get("delta", {}).get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        messages.append({"role": "assistant", "content": "".join(deltas)})


def chats(args):
    for name, model in models(args):
        with Server(args, ":memory:", model=model) as on, Server(args, ":memory:", NO_CACHE, model) as off:
            for side in [1, 4]:
                told = {"with the cache": [], "without": []}
                for round in range(args.chats // side):
                    for (way, list), server in zip(told.items(), [on, off]):
                        run = [(server.client(), 1000 * side + side * round + k, list) for k in range(side)]
                        threads = [threading.Thread(target=converse, args=one) for one in run]
                        [t.start() for t in threads]
                        [t.join() for t in threads]
                print(f"chats with {name}, {side} at once")
                for way, list in told.items():
                    read, cached = sum(one[2] for one in list), sum(one[3] for one in list)
                    hits = sum(one[3] > 0 for one in list)
                    last = [one[1] for one in list if one[0] == 7]
                    print(f"  {way}: first text {spread([one[1] for one in list])}, of the eighth turn {spread(last)}")
                    print(f"    {hits} of {len(list)} turns hit; {cached} of {read} prompt tokens not read again ({cached / read:.1%})")
            print(f"  the cache: {on.metric('rewake_prefix_states'):.0f} states, {on.metric('rewake_prefix_bytes') / 1e6:.0f} MB")


def prompt(args):
    for name, model in models(args):
        with Server(args, ":memory:", model=model) as on, Server(args, ":memory:", NO_CACHE, model) as off:
            told = {"with the cache": [], "without": []}
            for n in range(args.prompts + 1):
                for (way, list), server in zip(told.items(), [on, off]):
                    body = {"prompt": ids(1400, n + 1), "max_tokens": 1}
                    first = server.client().first_text("/v1/completions", body)[0]
                    if n:
                        list.append(first)
            print(f"a new prompt of 1,400 tokens, {name}")
            for way, list in told.items():
                print(f"  {way}: first text {spread(list)}")
            ratios = [a / b for a, b in zip(*told.values())]
            print(f"  ratio of each pair: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
            print(f"  the cache: {on.metric('rewake_prefix_states'):.0f} states")


def models(args):
    for name in args.models:
        if name == "demo":
            yield name, None
            continue
        file = ROOT / f"target/compare-llama/{name}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, ROOT / "tests/bench/random_model.py", name, file], check=True)
        yield name, file


PARTS = {"histories": histories, "stored": stored, "open": opened, "chats": chats, "prompt": prompt}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--binary", default=str(ROOT / "target/release/rewake"))
    parser.add_argument("--disk", default=None, metavar="FOLDER", help="for states; by default where temporary files are")
    parser.add_argument("--tmpfs", default="/dev/shm", metavar="FOLDER", help="a file system in memory")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 10_000, 1_000_000], metavar="TOKENS")
    parser.add_argument("--times", type=int, default=30, help="of each operation")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--models", nargs="+", default=["demo", "0.1B"], metavar="demo|SIZE")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {unknown.pop()}")
    for part in args.parts or PARTS:
        PARTS[part](args)


if __name__ == "__main__":
    main()
