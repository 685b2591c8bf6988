"""Containers: podman in a place of its own, and docker-compose that speaks to it."""
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PACKAGES = ["podman", "runc", "netavark", "aardvark-dns", "catatonit", "iptables", "docker-compose",
            "debootstrap"]
FILES = ["docker-compose.yml", "compose.dev.yml", "tests/compose/override.yml"]

# Of our own, so that nothing of the machine's is changed. 'runc', because crun refuses machines with both kinds of control
# groups; limits that are not above what this process has, because raising them is refused in some places.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{run}/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{store}/networks"
"""
# Podman notes both in the store, and wants them to stay as they are.
STORE = ROOT / ".cache" / "containers"
RUN = pathlib.Path("/run/pgstrata-containers")


class Unable(Exception):
    """Containers can't run here."""


class Failed(Exception):
    """A command failed, or something is not as it is to be."""


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(*command, timeout=600, **how):
    """The output of a command that has to succeed."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **how)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def install():
    missing = [name for name in PACKAGES if subprocess.run(
        ["dpkg-query", "-W", "-f", "${Status}", name], capture_output=True, text=True, check=False,
    ).stdout != "install ok installed"]
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing, env=environment)
    except (Failed, FileNotFoundError) as error:
        raise Unable(error) from error


class Engine:
    """All of it ends with this, but for images."""

    def __init__(self, keep):
        if os.geteuid() != 0:
            raise Unable("it needs root")
        install()
        self.keep = keep
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pgstrata-compose-"))
        self.project = self.directory.name.replace("_", "").lower()
        for directory in (STORE / "networks", RUN):
            directory.mkdir(parents=True, exist_ok=True)
        self.write("containers.conf", CONFIGURATION.format(run=RUN, store=STORE))
        self.write("storage.conf", f'[storage]\ndriver = "overlay"\ngraphroot = "{STORE}"\nrunroot = "{RUN}/storage"\n')
        self.socket = f"unix://{self.directory}/podman.sock"
        self.ports = {name: free_port() for name in
                      ["POSTGRES_PORT", "BRANCH_PORT", "BACKUP_PORT", "PROMETHEUS_PORT", "MINIO_PORT"]}
        self.environment = {
            **os.environ,
            **{name: str(port) for name, port in self.ports.items()},
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "DOCKER_HOST": self.socket,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_HTTP_TIMEOUT": "300",
        }
        # A network of its own, so that no address, port or filter of the machine's is changed, or in the way.
        self.network = f"pgs{os.getpid()}-compose"
        self.in_network = ["nsenter", f"--net=/run/netns/{self.network}", "--"]
        self.service = None
        self.ended = threading.Event()
        self.checker = threading.Thread(target=self.check_health, daemon=True)

    def write(self, name, text):
        (self.directory / name).write_text(text)

    def __enter__(self):
        try:
            run("ip", "netns", "add", self.network)
            run("ip", "-n", self.network, "link", "set", "lo", "up")
            self.podman("info")
            log = open(self.directory / "podman.log", "w")
            self.service = subprocess.Popen(
                [*self.in_network, "podman", "system", "service", "--time=0", self.socket], env=self.environment, stdout=log, stderr=log)
            deadline = time.monotonic() + 30
            while not (self.directory / "podman.sock").exists():
                if time.monotonic() > deadline or self.service.poll() is not None:
                    raise Unable((self.directory / "podman.log").read_text())
                time.sleep(0.05)
        except Failed as error:
            self.remove()
            raise Unable(error) from error
        self.checker.start()
        return self

    def __exit__(self, kind, error, _):
        self.ended.set()
        self.checker.join(timeout=30)
        if self.keep:
            words = " ".join(f"{name}={value}" for name, value in self.environment.items()
                             if os.environ.get(name) != value)
            say(f"kept. To get at it: nsenter --net=/run/netns/{self.network} env {words} bash\n"
                f"to end it: docker-compose {' '.join(f'-f {name}' for name in FILES)} down -v; kill {self.service.pid}; "
                f"ip netns del {self.network}")
            return
        if error is not None:
            with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                self.report()
        try:
            self.compose("--profile", "branch", "--profile", "tools", "down", "-v", "--remove-orphans", "-t", "5")
        except (Failed, subprocess.TimeoutExpired) as trouble:
            say(f"removing what was started: {trouble}")
            for what in ("container", "volume", "network"):
                with contextlib.suppress(Failed):
                    names = self.podman(what, "ls", "-q", *(["-a"] if what == "container" else []),
                                        "--filter", f"name={self.project}").split()
                    names and self.podman(what, "rm", "-f", *names)
        finally:
            self.service.send_signal(signal.SIGTERM)
            try:
                self.service.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.service.kill()
            self.remove()

    def remove(self):
        run("ip", "netns", "del", self.network)
        shutil.rmtree(self.directory)

    def podman(self, *arguments, timeout=600, **how):
        return self.here("podman", *arguments, timeout=timeout, **how)

    def here(self, *command, environment=None, **how):
        """Runs a command on the machine that the containers are on."""
        return run(*self.in_network, *command, env={**self.environment, **(environment or {})}, **how)

    def compose(self, *arguments, timeout=300, environment=None):
        files = [word for name in FILES for word in ("-f", ROOT / name)]
        return self.here("docker-compose", *files, "--project-directory", ROOT, *arguments, timeout=timeout,
                         environment=environment)

    def container(self, service):
        """Its name."""
        return f"{self.project}_{service}_1"

    def inside(self, service, *command, timeout=120):
        return self.podman("exec", self.container(service), *command, timeout=timeout)

    def command(self, *arguments, timeout=120):
        """What 'docker compose run --rm pgstrata ...' prints."""
        return self.compose("run", "--rm", "-T", "pgstrata", *arguments, timeout=timeout)

    def state(self, service):
        return json.loads(self.podman("inspect", self.container(service)))[0]["State"]

    def wait(self, what, is_so, seconds):
        """Until something is so; returns what it was asked for, and how many seconds that took."""
        began = time.monotonic()
        last = None
        while time.monotonic() - began < seconds:
            try:
                if found := is_so():
                    return found, time.monotonic() - began
                last = "no"
            except (Failed, OSError, ValueError, KeyError) as error:
                last = error
            time.sleep(0.1)
        raise Failed(f"not in {seconds} s: {what}: {last}")

    def check_health(self):
        """Podman has systemd check containers' health; here nobody else does."""
        while not self.ended.wait(0.5):
            with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                for name in self.podman("ps", "--format", "{{.Names}}", "--filter", f"name={self.project}").split():
                    if self.ended.is_set():
                        return
                    # The status is what the check says; it is kept with the container.
                    subprocess.run([*self.in_network, "podman", "healthcheck", "run", name], env=self.environment, capture_output=True,
                                   timeout=30, check=False)

    def report(self):
        print(self.podman("ps", "-a", "--filter", f"name={self.project}", "--format", "{{.Names}} {{.Status}}"))
        for name in self.podman("ps", "-aq", "--filter", f"name={self.project}").split():
            done = subprocess.run([*self.in_network, "podman", "logs", "--tail", "15", "--names", name], env=self.environment, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False)
            print(done.stdout)
