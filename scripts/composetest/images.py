"""Images: Debian's by debootstrap, ours by the Dockerfile."""
import pathlib
import shutil
import tempfile

from .engine import ROOT, Failed, Unable, run, say

DEBIAN = "docker.io/library/debian:bookworm-slim"
PROGRAMS = ["safekeeper", "pageserver", "storage-broker", "compute-shim", "libpgstrata_preload.so", "pgstrata", "s3-server"]


def debian(engine):
    """What the Dockerfile begins with. Where a registry can't be reached, by the packages that make it."""
    try:
        engine.podman("image", "exists", DEBIAN)
        return
    except Failed:
        pass
    say("making an image of Debian")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="pgstrata-debian-"))
    try:
        run("debootstrap", "--variant=minbase", "bookworm", directory / "root", timeout=1200)
        archive = directory / "root.tar"
        run("tar", "-C", directory / "root", "-cf", archive, ".")
        engine.podman("import", "--change", "CMD bash", archive, DEBIAN)
    except Failed as error:
        raise Unable(error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make(engine):
    programs = ROOT / "target" / "release"
    missing = [name for name in PROGRAMS if not (programs / name).is_file()]
    if missing:
        raise Failed(f"{programs} has no {', '.join(missing)}: 'make test-compose' builds them")
    debian(engine)
    # Packages are fetched by this machine's way to them, and so not from the network that the containers will have. The names are those that compose files have.
    build = ["build", "--quiet", "--network", "host", "--format", "docker"]
    podman = lambda *how, **more: run("podman", *build, *how, env=engine.environment, **more)
    say("building the image, as docker build --target local does")
    podman("--target", "local", "--tag", "docker.io/library/pgstrata", ROOT, timeout=1200)
    podman("--file", ROOT / "tests/compose/Dockerfile", "--tag", "docker.io/library/pgstrata-test", ROOT,
                  timeout=1200)
