"""What is asked of a cluster that 'docker compose up' has made."""
import json
import os
import re
import tempfile
import threading
import time

from .engine import Failed, say

PASSWORD = "postgres"
SERVICES = ["broker", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "compute", "minio", "prometheus"]
# Longest that a client may wait while a zone is cut off, in seconds.
LONGEST_STALL = 2.0


def check(is_so, what):
    if not is_so:
        raise Failed(f"is not so: {what}")


def equal(found, expected, what):
    check(found == expected, f"{what}: {found!r} is to be {expected!r}")


class Cluster:
    def __init__(self, engine):
        self.engine = engine
        self.directory = tempfile.mkdtemp(prefix="pgstrata-ca-", dir=engine.directory)
        os.chmod(engine.directory, 0o755)

    def healthy(self, *services, seconds=90):
        def are_healthy():
            states = {service: self.engine.state(service) for service in services}
            # One without a check of its own is to be running.
            wrong = {service: state.get("Healthcheck", state.get("Health", {})).get("Status") or state["Status"]
                     for service, state in states.items()}
            wrong = {service: said for service, said in wrong.items() if said not in ("healthy", "running")}
            if wrong:
                raise Failed(f"{wrong}")
            return True
        return self.engine.wait(f"{', '.join(services)} healthy", are_healthy, seconds)[1]

    def sql(self, text, service="compute", timeout=60):
        """As 'docker compose exec compute psql' has it: by the Unix socket, as the user that PostgreSQL is."""
        return self.engine.inside(service, "psql", "-XAtqc", text, timeout=timeout).strip()

    def from_outside(self, program, *arguments, port, user, password, host="127.0.0.1", mode="verify-full", options=""):
        """A stock client on this machine, which has nothing of the cluster but the CA."""
        uri = f"host={host} port={self.engine.ports[port]} user={user} sslmode={mode} sslrootcert={self.directory}/ca.pem"
        if program in ("psql", "pgbench"):
            uri += " dbname=postgres"
        # pgbench takes its connection as the database's name, and last.
        where = [f"{uri} {options}"] if program == "pgbench" else ["-d", f"{uri} {options}"]
        return self.engine.here(program, *arguments, *where, environment={"PGPASSWORD": password})


def first_minutes(cluster):
    """What the head of docker-compose.yml says, in its order."""
    engine = cluster.engine
    engine.podman("cp", f"{engine.container('compute')}:/tls/ca.pem", f"{cluster.directory}/ca.pem")
    engine.inside("compute", "psql", "-c", "select version()")
    psql = lambda **how: cluster.from_outside(
        "psql", "-XAtqc", "select 1", port="POSTGRES_PORT", **{"user": "postgres", "password": PASSWORD, **how})
    equal(psql().strip(), "1", "psql with sslmode=verify-full, by an address")
    equal(psql(host="localhost").strip(), "1", "psql with sslmode=verify-full, by a name")
    for wrong, complaint in [({"password": "wrong"}, "password authentication failed"),
                             ({"user": "nobody"}, "password authentication failed")]:
        try:
            psql(**wrong)
        except Failed as refused:
            check(complaint in str(refused), f"{wrong}: {refused}")
        else:
            raise Failed(f"{wrong}: it connects")

    for arguments in [["-i", "-q"], ["-n", "-c", "4", "-t", "50"]]:
        cluster.from_outside("pgbench", *arguments, port="POSTGRES_PORT", user="postgres", password=PASSWORD)
    cluster.sql("create table t as select generate_series(1, 1000) a")
    lsn = engine.command("lsn").strip()
    check(re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", lsn), f"an LSN: {lsn}")
    cluster.sql("delete from t")
    equal(cluster.sql("select count(*) from t"), "0", "rows after the DELETE")
    began = time.monotonic()
    engine.command("branch", "create", "before", "--at", lsn)
    engine.compose("up", "-d", "branch", environment={"BRANCH": "before"})
    cluster.healthy("branch")
    equal(cluster.sql("select count(*) from t", service="branch"), "1000", "rows on the branch")
    equal(cluster.from_outside("psql", "-XAtqc", "select sum(a) from t", port="BRANCH_PORT", user="postgres",
                               password=PASSWORD).strip(), "500500", "the branch, from outside")
    say(f"a branch of the past, and a compute on it, by docker-compose run and up: {time.monotonic() - began:.1f} s")
    engine.compose("rm", "-sf", "branch")

    token = engine.compose("run", "--rm", "-T", "--entrypoint", "pgstrata", "certificates",
                           "auth", "token", "--dir", "/pki/made", "--scope", "read", "--ttl", "1h").strip()
    backup = f"{cluster.directory}/backup"
    cluster.from_outside("pg_basebackup", "-D", backup, "-X", "fetch", port="BACKUP_PORT", user="token", password=token,
                         options=f"options='-c pgstrata.branch=main -c pgstrata.lsn={lsn}'")
    check(os.path.exists(f"{backup}/backup_manifest"), "pg_basebackup made a data directory")
    try:
        cluster.from_outside("pg_basebackup", "-D", f"{backup}2", "-X", "fetch", port="BACKUP_PORT", user="token",
                             password="none", options="options='-c pgstrata.branch=main'")
    except Failed:
        pass
    else:
        raise Failed("pg_basebackup needs no token")


def what_is_whose(cluster):
    """Everybody has his own key and nobody else's, and runs as nobody in particular."""
    engine = cluster.engine
    keys = {}
    for service in ["broker", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "compute"]:
        equal(engine.inside(service, "id", "-un").strip(), "postgres", f"user of {service}")
        keys[service] = engine.inside(service, "sha256sum", "/tls/key.pem").split()[0]
        equal(engine.inside(service, "find", "/tls", "-name", "*key.pem", "-perm", "/077").strip(), "", "keys that others read")
        check("ca-key.pem" not in engine.inside(service, "find", "/tls"), f"{service} has the CA's key")
        names = engine.inside(service, "sh", "-c", "touch /usr/x 2>&1 || true")
        check("ermission denied" in names or "ead-only" in names, f"{service} can write into its image: {names}")
    equal(len(set(keys.values())), len(keys), "different keys")
    status = json.loads(engine.command("status", "--json"))
    equal(sorted(row.get("zone") for row in status["processes"] if row["role"] == "safekeeper"),
          ["zone-a", "zone-b", "zone-c"], "zones")


def prometheus(cluster):
    def targets():
        url = f"http://127.0.0.1:{cluster.engine.ports['PROMETHEUS_PORT']}/api/v1/targets?state=active"
        found = json.loads(cluster.engine.here("curl", "-fsS", "-m", "5", url))["data"]["activeTargets"]
        wrong = [f"{one['scrapeUrl']}: {one['health']} {one['lastError']}" for one in found if one["health"] != "up"]
        if wrong or len(found) != 6:
            raise Failed("; ".join(wrong) or f"{len(found)} targets")
        return True
    cluster.engine.wait("Prometheus has all six", targets, 30)


def pgbench(cluster, seconds, service="compute"):
    """Starts it in a container; returns a function that waits for its end and returns (transactions, longest in s)."""
    engine = cluster.engine
    engine.inside(service, "sh", "-c", "rm -rf /tmp/log && mkdir /tmp/log")
    result = {}

    def work():
        try:
            result["said"] = engine.inside(service, "pgbench", "-n", "-c", "4", "-T", str(seconds), "-l",
                                           "--log-prefix", "/tmp/log/t", "postgres", timeout=seconds + 90)
        except Failed as failed:
            result["failed"] = failed

    thread = threading.Thread(target=work)
    thread.start()

    def finish():
        thread.join()
        if "failed" in result:
            raise result["failed"]
        check("number of failed transactions: 0" in result["said"], result["said"])
        rows = [int(line.split()[2]) for line in engine.inside(service, "sh", "-c", "cat /tmp/log/*").splitlines()]
        return len(rows), max(rows) / 1e6
    return finish


def cut(engine, service):
    engine.podman("network", "disconnect", f"{engine.project}_pgstrata", engine.container(service))


def heal(engine, service):
    engine.podman("network", "connect", "--alias", service, f"{engine.project}_pgstrata", engine.container(service))


def same_bytes(cluster):
    """Waits until all safekeepers have the same, and compares their files."""
    engine = cluster.engine
    services = ["safekeeper-1", "safekeeper-2", "safekeeper-3"]
    rows = json.loads(engine.command("branch", "list", "--json"))
    timeline = next(row["timeline_id"] for row in rows if row["name"] == "main")

    def flushed(service):
        status = json.loads(engine.inside(service, "curl", "-fsS", "https://localhost:7103/v1/status"))
        return [(row["flush_lsn"], row["commit_lsn"]) for row in status["timelines"] if row["timeline_id"] == timeline]

    def files(service):
        found = engine.inside(service, "sh", "-c",
                              f"cd /data && find . -path '*{timeline}*' -name '0000*' -type f | xargs sha256sum")
        return {path: digest for digest, path in (line.split() for line in found.splitlines())}

    def are_same():
        # A server writes a little also when nobody asks it to, so it is to have written nothing meanwhile; and safekeepers
        # remove what is archived each in its own time.
        before = [flushed(service) for service in services]
        found = [files(service) for service in services]
        if not before[0] or any(one != before[0] for one in before + [flushed(service) for service in services]):
            raise Failed(f"{before}")
        common = set.intersection(*(set(one) for one in found))
        check(common, f"files that all have: {found}")
        for path in common:
            equal([one[path] for one in found], [found[0][path]] * 3, f"contents of {path}")
        return True
    engine.wait("all safekeepers have the same", are_same, 60)


def zones(cluster):
    """A zone that is cut off stops nobody; a compute that is, with a minority, commits nothing, and is fenced."""
    engine = cluster.engine
    cluster.sql("create table kept (a int)")
    engine.inside("compute", "pgbench", "-i", "-q", "-s", "1", "postgres", timeout=180)
    finish = pgbench(cluster, 12)
    time.sleep(3)
    cut(engine, "safekeeper-3")
    time.sleep(5)
    heal(engine, "safekeeper-3")
    count, longest = finish()
    say(f"zone-c cut off for 5 s of 12: {count} transactions, 0 failed, longest {longest * 1000:.0f} ms")
    check(longest < LONGEST_STALL, f"the longest transaction took {longest} s")
    same_bytes(cluster)

    # zone-a with its compute: that one has one safekeeper of three.
    cluster.sql("insert into kept values (1)")
    for service in ["compute", "safekeeper-1"]:
        cut(engine, service)
    lonely = {}

    def insert():
        try:
            lonely["said"] = cluster.sql("insert into kept values (2)", timeout=180)
        except Failed as failed:
            lonely["failed"] = failed
    thread = threading.Thread(target=insert)
    thread.start()
    time.sleep(1)
    engine.compose("up", "-d", "--no-deps", "branch", environment={"BRANCH": "main"})
    took = cluster.healthy("branch")
    cluster.sql("insert into kept values (3)", service="branch")
    say(f"a compute in another zone took over from one that was cut off, in {took:.1f} s")
    check(not lonely, f"a minority acknowledged a commit, or ended: {lonely}")
    for service in ["compute", "safekeeper-1"]:
        heal(engine, service)
    thread.join(timeout=90)
    check("failed" in lonely, f"the old compute's commit failed: {lonely}")

    def is_fenced():
        done = engine.inside("compute", "curl", "-sS", "https://localhost:5433/readyz")
        return "fenced" in done or "newer compute" in done
    engine.wait("the old compute is fenced, and stays", is_fenced, 60)
    # Also where something starts it again, as a machine does that was started anew.
    engine.podman("restart", "-t", "5", engine.container("compute"))
    engine.wait("the old compute is fenced after a restart", is_fenced, 30)
    cluster.healthy("branch")
    equal(cluster.sql("select string_agg(a::text, ' ' order by a) from kept", service="branch"), "1 3", "rows")
    same_bytes(cluster)
    engine.compose("rm", "-sf", "branch")
    engine.compose("up", "-d", "--force-recreate", "--no-deps", "compute")
    cluster.healthy("compute")


def deaths(cluster):
    """What was killed is started again, and what is made anew has everything that was committed."""
    engine = cluster.engine
    for service in ["safekeeper-2", "pageserver", "broker", "compute"]:
        before = engine.state(service)["Pid"]
        os.kill(before, 9)
        engine.wait(f"{service} is started again", lambda: engine.state(service)["Pid"] not in (0, before), 30)
    cluster.healthy(*SERVICES)
    equal(cluster.sql("select count(*) from kept"), "2", "rows after kill -9 of four services")
    engine.compose("down", "-t", "20")
    up(cluster)
    equal(cluster.sql("select count(*) from kept"), "2", "rows after down and up")
    equal(engine.command("branch", "list").count("main"), 2, "branch main, once, and as what 'before' is of")


def up(cluster):
    began = time.monotonic()
    cluster.engine.compose("up", "-d", timeout=600)
    cluster.healthy(*SERVICES)
    return time.monotonic() - began


def run_scenario(engine):
    cluster = Cluster(engine)
    say(f"docker-compose up: all healthy after {up(cluster):.1f} s")
    for step in [first_minutes, what_is_whose, prometheus, zones, deaths]:
        began = time.monotonic()
        step(cluster)
        say(f"passed: {step.__name__.replace('_', ' ')} ({time.monotonic() - began:.0f} s)")
