"""Zones as network namespaces, joined by far-switch: packets and TCP stacks are real, what they meet on the way is set."""
import json, os, queue, subprocess, threading
from pathlib import Path

from .common import STARTED, as_user, end

DEVICE = Path("/dev/net/tun")
PREFIX = "pgstrata-net-"
PATIENCE_S = 20
LONGEST_RUN_S = 600


def lacks(programs):
    """What a network of this kind lacks here, if anything."""
    if os.getuid() != 0:
        return "root"
    return next((str(path) for path in (DEVICE, programs / "far-switch") if not path.exists()), None)


def ip(arguments):
    done = subprocess.run(["ip", *arguments.split()], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"ip {arguments}: {done.stderr.strip()}")


class Network:
    """Zones of these names, at 10.99.0.1 and so on. Between any two, each way takes as long and loses as much as is set;
    within one, nothing does."""

    def __init__(self, directory, programs, zones, seed=1):
        self.zones, self.hosts, self.switch = zones, directory / "hosts", None
        self.namespaces = []
        self.answers = queue.Queue()
        STARTED.callback(self.stop)
        self.remove_leftovers()
        switch = self.add("switch")
        command = ["nsenter", f"--net=/run/netns/{switch}", "--", programs / "far-switch", "--seed", str(seed), *zones]
        self.switch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self.listen, args=(self.switch.stdout,), daemon=True).start()
        self.answer()
        known = ["127.0.0.1 localhost"]
        for number, zone in enumerate(zones, 1):
            own, address = self.add(zone), f"10.99.0.{number}"
            ip(f"-n {switch} link set {zone} netns {own} name eth0")
            ip(f"-n {own} addr add {address}/24 dev eth0")
            ip(f"-n {own} link set eth0 up")
            ip(f"-n {own} link set lo up")
            known.append(f"{address} {zone}")
        self.hosts.write_text("\n".join(known) + "\n")

    def remove_leftovers(self):
        """Networks of runs that were killed: their names begin with their process ids."""
        for path in Path("/run/netns").glob(f"{PREFIX}*-*"):
            process = path.name.removeprefix(PREFIX).split("-")[0]
            if process.isdigit() and not Path("/proc", process).exists():
                subprocess.run(["ip", "netns", "del", path.name], capture_output=True)

    def add(self, name):
        namespace = f"{PREFIX}{os.getpid()}-{name}"
        self.namespaces.append(namespace)
        ip(f"netns add {namespace}")
        return namespace

    def listen(self, said):
        for line in said:
            self.answers.put(json.loads(line))

    def answer(self):
        try:
            return self.answers.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise SystemExit("far-switch does not answer")

    def set(self, delay_ms, loss_percent):
        """Returns what became of frames so far."""
        self.switch.stdin.write(f"{delay_ms} {loss_percent}\n")
        self.switch.stdin.flush()
        return self.answer()

    def on(self, zone, command):
        """A command in a zone, where names of zones are known. It stays one process."""
        own = f"--net=/run/netns/{PREFIX}{os.getpid()}-{zone}"
        known = f'mount --bind {self.hosts} /etc/hosts && exec "$@"'
        return ["nsenter", own, "--", "unshare", "--mount", "--", "sh", "-c", known, "sh", *command]

    def run(self, zone, command):
        """Runs a command in a zone as PostgreSQL's user. Returns what it says."""
        command = self.on(zone, as_user(command))
        done = subprocess.run(command, cwd="/", text=True, capture_output=True, timeout=LONGEST_RUN_S)
        if done.returncode:
            raise SystemExit(f"in {zone}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def stop(self):
        if self.switch:
            self.switch.stdin.close()
            end(self.switch)
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        self.namespaces = []
