"""Rewake and llama-server as a client sees them: started, asked by many streams at once, timed. Linux; Python 3.9, nothing else.

One thread reads all connections and only notes when which bytes came; what they say is looked at afterwards. So the client takes
little of the processors that the servers compute with, and equally much with both.
"""

import http.client, json, os, pathlib, random, selectors, socket, subprocess, sys, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = ROOT / "target/compare-llama"
# llama-server's own defaults, said to both.
SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def ids(count, seed):
    """Any tokens of the World vocabulary that are not the end of a text; what they say does not matter."""
    rng = random.Random(seed)
    return [rng.randrange(300, 65000) for _ in range(count)]


def busy():
    """Seconds that all processors together have worked or were taken from this machine, and those of this process and its ended children."""
    user, nice, system, _, _, *more = (int(n) for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def alone(work, most=0.05, tries=20):
    """What `work()` gives while others take no more than that part of one processor; it is done again until they do not.

    A disturbed peer would flatter us. What `work` starts must have ended with it.
    """
    for _ in range(tries):
        while others(lambda: time.sleep(0.5))[1] > most:
            pass
        result, share = others(work)
        if share <= most:
            return result
        print(f"  others took {share:.0%} of a processor: once more", file=sys.stderr)
    sys.exit("this machine is never left alone")


def others(work):
    began, (all_before, own_before) = time.perf_counter(), busy()
    result = work()
    all_after, own_after = busy()
    return result, (all_after - all_before - own_after + own_before) / (time.perf_counter() - began)


class Server:
    """A process that answers under /v1/completions, ended by the end of its `with`."""

    def __init__(self, command, ready=None):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("REWAKE_", "LLAMA_"))}
        env["REWAKE_LOG"] = "error"
        began = time.perf_counter()
        out = subprocess.PIPE if ready else subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.DEVNULL, text=True)
        if ready:
            line = next((line for line in self.process.stdout if ready in line), None)
            self.port = int(line.rsplit(":", 1)[1]) if line else sys.exit(f"{command[0]} ended before it was ready")
        else:
            self.port = int(command[command.index("--port") + 1])
            while not self.healthy():
                if self.process.poll() is not None:
                    sys.exit(f"{command[0]} ended before it was ready")
                time.sleep(0.05)
        self.started = time.perf_counter() - began

    def healthy(self):
        try:
            asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            asked.request("GET", "/health")
            return asked.getresponse().status == 200
        except OSError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def rewake(binary, model, threads, *more, setting=None):
    """`setting`: a variable of the environment, as NAME=VALUE."""
    place = ["--model", model] if model else []
    settings = [setting] * bool(setting) + [f"REWAKE_ENGINE__THREADS={threads}"] * bool(threads)
    command = ["env", *settings, binary, "serve", *place, "--port", "0", "--state-dir", ":memory:", *more]
    return Server([str(part) for part in command], "is serving on http://")


def llama(folder, model, threads, slots):
    """With room for as many texts at once. A slot's room for tokens costs a recurrent model nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [f"{folder}/llama-server", "-m", model, "--port", port, "-np", slots, "-c", 4096 * slots]
    return Server([str(part) for part in [*command, *(["-t", threads] if threads else [])]])


class Stream:
    """One streamed completion and when its bytes came."""

    def __init__(self, port, tokens, new, **more):
        body = {"prompt": tokens, "max_tokens": new, "stream": True, "stream_options": {"include_usage": True}}
        # 0 ends a text: every stream shall be as long as the others.
        data = json.dumps({**body, **SAMPLING, "logit_bias": {"0": -100}, **more}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = time.perf_counter()
        self.socket.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        self.parts, self.events, self.done = [], 0, False

    def read(self):
        data = self.socket.recv(1 << 16)
        self.parts.append((time.perf_counter(), data))
        self.events += data.count(b"data: {")
        self.done = not data

    def heard(self):
        """When each text came, and what usage said (None if the stream was left before)."""
        times, usage, line = [], None, b""
        for when, data in self.parts:
            *lines, line = (line + data).split(b"\n")
            for one in lines:
                if not one.startswith(b"data: {"):
                    assert not one.startswith(b"HTTP/") or b" 200 " in one, b"".join(d for _, d in self.parts)[:1000]
                    continue
                chunk = json.loads(one[6:])
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                if any(choice.get("text") for choice in chunk["choices"]):
                    times.append(when)
        return times, usage


class Crowd:
    """Streams that are read together."""

    def __init__(self):
        self.selector, self.streams = selectors.DefaultSelector(), []

    def add(self, stream):
        self.streams.append(stream)
        self.selector.register(stream.socket, selectors.EVENT_READ, stream)
        return stream

    def read_until(self, enough):
        """Reads until `enough()` or the end of all streams."""
        while not enough() and self.selector.get_map():
            for key, _ in self.selector.select(timeout=600):
                key.data.read()
                if key.data.done:
                    self.leave(key.data)

    def leave(self, stream):
        self.selector.unregister(stream.socket)
        stream.socket.close()

    def leave_all(self):
        [self.leave(key.data) for key in list(self.selector.get_map().values())]


def gaps(times):
    return [after - before for before, after in zip(times, times[1:])]


def part(values, share):
    """The value below which that share of them lies."""
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]
