#!/usr/bin/env python3
"""Three servers behind nginx that share a bucket, one of them killed every few seconds.

    python3 -m venv venv && venv/bin/pip install -r tests/cluster/requirements.txt
    cargo build --release && venv/bin/python tests/cluster/run.py target/release/rewake

First one server alone, on a folder, says what every turn of every session is to be. Then the same turns go through nginx
(or, where it is not installed, to one server after the other) to three servers over moto's S3, which honours
If-None-Match; each turn has an Idempotency-Key, and whoever gets no answer asks again. All the time one server after the
other is killed with SIGKILL and started again. Every text must be the expected one, and every session must have exactly
its turns. At the end all three servers are asked at once for the next turn of one session, again and again: one of them
commits it, the others say 409 or 412.
"""

import argparse, collections, http.client, json, os, pathlib, random, re, shutil, signal, socket, subprocess, sys
import tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["Once upon a time", " Then", " But", " So", "\n", " One day", " He said", " The dog"]

MOTO = """
import logging, sys
from werkzeug.serving import run_simple
from moto.server import DomainDispatcherApplication, create_backend_app
logging.getLogger("werkzeug").setLevel(logging.ERROR)
# One request at a time: it looks whether an object is there and then writes it.
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Failed(Exception):
    """No whole answer came."""


def ask(port, method, path, body=None, headers={}, timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json", **headers})
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if text[:1] in b"{[" and text else {}
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Failed(repr(error)) from None
    finally:
        connection.close()


def until(what, check, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if check():
                return
        except Failed:
            pass
        time.sleep(0.05)
    sys.exit(f"{what}: not within {seconds} s")


class Server:
    def __init__(self, binary, config, log):
        self.binary, self.config, self.log, self.port, self.kills = binary, config, log, free_port(), 0
        self.start()

    def start(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("REWAKE_", "AWS_"))}
        env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "REWAKE_LOG": "warn"}
        command = [self.binary, "serve", "--port", str(self.port), "--config", self.config]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=self.log)

    def ready(self):
        return ask(self.port, "GET", "/ready", timeout=2)[0] == 200

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.start()


def turn(session, n):
    rng = random.Random(f"{session}/{n}")
    return {
        "session_id": session, "prompt": PROMPTS[0] if n == 0 else rng.choice(PROMPTS[1:]), "seed": rng.randrange(2**31),
        "temperature": 0.8, "max_tokens": rng.randint(2, 8), "logit_bias": {"0": -100},
    }


def expect(args, folder, log):
    """What one server alone says."""
    config = folder / "alone.toml"
    config.write_text(f'[states]\ndir = "{folder}/alone"\n')
    server = Server(args.binary, config, log)
    until("the server alone", server.ready)
    expected = {}

    def run(sessions):
        for session in sessions:
            for n in range(args.turns):
                status, reply = ask(server.port, "POST", "/v1/completions", turn(session, n))
                assert status == 200, reply
                expected[session, n] = reply["choices"][0]["text"]

    names = [f"s{i}" for i in range(args.sessions)]
    threads = [threading.Thread(target=run, args=(names[i::4],)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    server.process.kill()
    server.process.wait()
    assert len(expected) == args.sessions * args.turns
    return expected


def nginx(folder, ports, log):
    """The proxy's process and port; without nginx, none."""
    if not shutil.which("nginx"):
        return None, None
    port = free_port()
    conf = (ROOT / "docker/nginx.cluster.conf").read_text()
    for n, there in enumerate(ports, 1):
        conf = conf.replace(f"rewake-{n}:8080", f"127.0.0.1:{there}")
    conf = re.sub(r"listen 80;", f"listen 127.0.0.1:{port};", conf)
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    whole = f"pid {folder}/nginx.pid;\nerror_log /dev/null;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{conf}}}\n"
    (folder / "nginx.conf").write_text(whole)
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    return process, port


class Load:
    def __init__(self, args, expected, ports, proxy):
        self.args, self.expected, self.ports, self.proxy = args, expected, ports, proxy
        self.counts, self.lock, self.wrong = collections.Counter(), threading.Lock(), []

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def commit(self, session, n):
        """Sends one turn until its answer is there."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            port = self.proxy or random.choice(self.ports)
            try:
                key = {"idempotency-key": f"{session}-{n}"}
                status, reply = ask(port, "POST", "/v1/completions", turn(session, n), key)
            except Failed:
                self.count("connections lost")
                continue
            if status == 200 and reply.get("state"):
                return reply
            code = (reply.get("state_error") or reply.get("error") or {}).get("code")
            if status == 200 and code == "session_conflict":
                self.count("200 session_conflict")
            elif status in (409, 412, 500, 502, 503, 504):
                self.count(f"{status} {code or ''}".strip())
                time.sleep(0.05)
            else:
                self.wrong.append((session, n, status, reply))
                return None
        self.wrong.append((session, n, "no answer in 60 s"))

    def converse(self, sessions):
        for n in range(self.args.turns):
            for session in sessions:
                reply = self.commit(session, n)
                if reply is None:
                    return
                text, number = reply["choices"][0]["text"], reply["state"]["turn"]
                if text != self.expected[session, n] or number != n + 1:
                    self.wrong.append((session, n, number, text, self.expected[session, n]))
                    return
                self.count("turns")


def contend(servers, rounds):
    """All servers at once for the next turn of one session."""
    outcomes = collections.Counter()
    for n in range(rounds):
        replies = [None] * len(servers)

        def run(i):
            body = {"session_id": "contended", "prompt": f" {n}", "max_tokens": 3, "temperature": 0}
            replies[i] = ask(servers[i].port, "POST", "/v1/completions", body)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(servers))]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for status, reply in replies:
            code = (reply.get("state_error") or reply.get("error") or {}).get("code")
            outcomes[f"{status} {code}" if code else str(status)] += 1
    won = ask(servers[0].port, "GET", "/v1/sessions/contended")[1]["turn"]
    return outcomes, won


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", nargs="?", default=str(ROOT / "target/release/rewake"))
    parser.add_argument("--sessions", type=int, default=105)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--kill-every", type=float, default=4.0, metavar="SECONDS")
    parser.add_argument("--contended", type=int, default=60, metavar="ROUNDS")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="rewake-cluster-"))
    log = open(folder / "log", "w")
    children = []
    try:
        began = time.monotonic()
        expected = expect(args, folder, log)
        print(f"{len(expected)} turns of one server alone: {time.monotonic() - began:.0f} s", flush=True)

        s3 = free_port()
        children.append(subprocess.Popen([sys.executable, "-c", MOTO, str(s3)], stdout=log, stderr=log))
        until("the bucket", lambda: ask(s3, "PUT", "/states")[0] == 200)
        servers = []
        for n in range(3):
            config = folder / f"{n}.toml"
            config.write_text(
                f'[states]\nurl = "s3://states/shared"\nendpoint = "http://127.0.0.1:{s3}"\n'
                f'memory_bytes = 8000000\ndir = "{folder}/{n}"\ndisk_bytes = 16000000\n'
            )
            servers.append(Server(args.binary, config, log))
        for server in servers:
            until("a server", server.ready)
        process, proxy = nginx(folder, [s.port for s in servers], log)
        if process:
            children.append(process)
            until("nginx", lambda: ask(proxy, "GET", "/health")[0] == 200)

        load = Load(args, expected, [s.port for s in servers], proxy)
        names = [f"s{i}" for i in range(args.sessions)]
        threads = [threading.Thread(target=load.converse, args=(names[i::6],), daemon=True) for i in range(6)]
        began = time.monotonic()
        [t.start() for t in threads]
        victim, last = 0, time.monotonic()
        while any(t.is_alive() for t in threads):
            time.sleep(0.1)
            if time.monotonic() - last > args.kill_every:
                servers[victim % 3].kill()
                victim, last = victim + 1, time.monotonic()
        took = time.monotonic() - began
        for server in servers:
            until("a server", server.ready)
        for session in names:
            for server in servers:
                head = ask(server.port, "GET", f"/v1/sessions/{session}")[1]
                if head.get("turn") != args.turns:
                    load.wrong.append((session, "ends at turn", head.get("turn")))
        outcomes, won = contend(servers, args.contended)

        through = "nginx" if proxy else "no proxy"
        kills = sum(s.kills for s in servers)
        print(f"{load.counts.pop('turns')} turns over three servers through {through}: {took:.0f} s, {kills} kills")
        print("on the way:", dict(sorted(load.counts.items())) or "nothing")
        print(f"contended, {args.contended} rounds: {dict(sorted(outcomes.items()))}, {won} turns committed")
        won_by_reply = outcomes.get("200", 0)
        allowed = {"200"} | {o for o in outcomes if o[:3] in ("409", "412")}
        if won_by_reply != won or set(outcomes) - allowed:
            load.wrong.append(("contended", dict(outcomes), won))
        for wrong in load.wrong[:10]:
            print("WRONG:", wrong)
        print("FAILED" if load.wrong else "PASSED")
        sys.exit(bool(load.wrong))
    finally:
        # Not killed: nginx ends its workers.
        for child in children + [s.process for s in locals().get("servers", [])]:
            child.terminate()
            child.wait()
        log.close()
        if "load" in locals() and not load.wrong:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"what the servers said is in {folder}/log", file=sys.stderr)


if __name__ == "__main__":
    main()
