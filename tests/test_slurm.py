"""SLURM for real: array, Dask and training jobs of `workflows/slurm`, stopped and resubmitted."""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import labelled
import pytest
from slurm_cluster import FLOWS, Slurm, cluster_script, environment_of

from tilenet.api import predict
from tilenet.config import PredictConfig

SLIDE = Path(__file__).parents[1] / "examples" / "images" / "CMU-1-Small-Region.svs"
FINE = ("--tile", 256, "--overlap", 64, "--block", 768)

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, ("sbatch", "srun", "slurmctld", "slurmd", "munged"))),
        reason="no SLURM here: `make slurm` installs it (Debian, as root)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def slurm(environment):
    # Not pytest's folder: munge's own user must reach it.
    folder = Path(tempfile.mkdtemp(prefix="tilenet-slurm-"))
    folder.chmod(0o755)
    try:
        cluster_script("start", folder)
        yield Slurm(environment_of(folder, environment, Path(sys.executable).parent))
    finally:
        cluster_script("stop", folder)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the files of the mask that a local run makes."""
    out = tmp_path_factory.mktemp("local") / "mask.zarr"
    predict([SLIDE], out, PredictConfig(tile=256, overlap=64, block=768))
    return contents(out)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begun(out, *, where=None, name="journal*"):
    """Wait until a block of an unfinished mask is journaled, or there is something elsewhere."""
    folder, end = where or out.with_name(f".{out.name}.tilenet"), time.monotonic() + 120
    while not any(p.stat().st_size for p in folder.rglob(name)):
        assert time.monotonic() < end, "nothing has begun"
        time.sleep(0.05)


def summary(job):
    """Return the last JSON document in a log."""
    return json.JSONDecoder().raw_decode(job.log, job.log.rindex('{\n "output"'))[0]


def test_an_array_gives_the_local_bytes(slurm, local, tmp_path):
    out = tmp_path / "mask.zarr"
    job = slurm.submit(tmp_path, "array.sbatch", SLIDE, "--out", out, *FINE)
    jobs = slurm.wait(job)
    assert [(one.state, one.code) for one in jobs] == [("COMPLETED", 0)] * 4, jobs
    parts = [summary(one) for one in jobs]
    assert any(part["complete"] for part in parts)
    assert all(0 < part["tiles_forwarded"] < part["tiles"] // 2 for part in parts), parts
    assert contents(out) == local


def test_an_array_that_is_cancelled_and_submitted_again(slurm, local, tmp_path):
    out = tmp_path / "mask.zarr"
    line = ("array.sbatch", SLIDE, "--out", out, *FINE)
    job = slurm.submit(tmp_path, *line)
    begun(out)
    slurm.call("scancel", job)
    assert "CANCELLED" in {one.state for one in slurm.wait(job)}
    assert not out.exists()
    jobs = slurm.wait(slurm.submit(tmp_path, *line))
    assert {one.state for one in jobs} == {"COMPLETED"}, jobs
    assert sum(summary(one)["blocks_resumed"] for one in jobs)
    assert contents(out) == local


def test_a_part_whose_time_is_up_goes_on_by_itself(slurm, local, tmp_path):
    """SLURM sends what `--signal=TERM@120` asks for; the script puts the job back."""
    out = tmp_path / "mask.zarr"
    job = slurm.submit(tmp_path, "array.sbatch", SLIDE, "--out", out, *FINE)
    begun(out)
    slurm.call("scancel", "--signal=TERM", f"{job}_0")
    jobs = slurm.wait(job)
    assert [(one.state, one.code) for one in jobs] == [("COMPLETED", 0)] * 4, jobs
    assert sum(one.restarts for one in jobs) == 1
    assert sum("exit code 143: once more" in one.log for one in jobs) == 1
    assert contents(out) == local


def test_what_a_rerun_does_not_mend_is_not_tried_again(slurm, tmp_path):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0broken")
    line = ("array.sbatch", broken, "--out", tmp_path / "mask.zarr")
    [job] = slurm.wait(slurm.submit(tmp_path, *line, options=["--array=0-0"]))
    assert (job.state, job.code, job.restarts) == ("FAILED", 3, 0), job


def test_a_broken_one_of_many_is_a_warning(slurm, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(SLIDE.with_name("fluorescence.png"), slides)
    (slides / "broken.tif").write_bytes(b"II*\0broken")
    line = ("array.sbatch", slides, "--out", tmp_path / "masks")
    jobs = slurm.wait(slurm.submit(tmp_path, *line, options=["--array=1-2"]))
    assert [(one.state, one.code) for one in jobs] == [("COMPLETED", 0)] * 2, jobs
    assert sum("warning: some inputs failed" in one.log for one in jobs) == 1
    assert (tmp_path / "masks" / "fluorescence.png").is_file()


@pytest.fixture
def workers(tmp_path):
    """Return the option of sbatch that names the file of workers: the shipped one, two at most."""
    path, text = tmp_path / "workers.toml", (FLOWS / "workers.toml").read_text()
    assert "adaptive = [1, 32]" in text
    path.write_text(text.replace("adaptive = [1, 32]", "adaptive = [1, 2]"))
    return f"--export=ALL,WORKERS={path}"


def test_workers_that_slurm_starts_give_the_local_bytes(slurm, local, workers, tmp_path):
    out = tmp_path / "mask.zarr"
    line = ("dask.sbatch", SLIDE, "--out", out, *FINE)
    [job] = slurm.wait(slurm.submit(tmp_path, *line, options=[workers]))
    assert (job.state, job.code) == ("COMPLETED", 0), job
    assert contents(out) == local
    started = [one for one in slurm.jobs() if "dask-worker" in one.name]
    assert started
    slurm.wait(",".join(one.id for one in started), seconds=60)


def test_a_dask_run_that_is_cancelled_and_submitted_again(slurm, local, workers, tmp_path):
    out = tmp_path / "mask.zarr"
    line = ("dask.sbatch", SLIDE, "--out", out, *FINE)
    job = slurm.submit(tmp_path, *line, options=[workers])
    begun(out)
    slurm.call("scancel", job)
    [ended] = slurm.wait(job)
    assert ended.state == "CANCELLED", ended
    started = [one.id for one in slurm.jobs() if "dask-worker" in one.name]
    slurm.wait(",".join(started), seconds=90)
    assert not out.exists()
    [job] = slurm.wait(slurm.submit(tmp_path, *line, options=[workers]))
    assert (job.state, job.code) == ("COMPLETED", 0), job
    assert summary(job)["blocks_resumed"]
    assert contents(out) == local


TRAIN = (
    "--arch", "classic-unet", "--set", "options={widths=[4, 8]}", "--tile", 32, "--batch-size", 2,
    "--epochs", 3, "--steps", 10, "--workers", 0, "--device", "cpu", "--precision", "fp32",
)  # fmt: skip


def test_two_processes_train_and_the_model_makes_a_mask(slurm, tmp_path):
    data, model, mask = labelled.pairs(tmp_path / "data"), tmp_path / "model", tmp_path / "m.png"
    image = data / "images" / "i0.png"
    options = ["--ntasks-per-node=2", f"--export=ALL,PREDICT={image},MASK={mask}"]
    line = ("train.sbatch", model, data, *TRAIN)
    job = slurm.submit(tmp_path, *line, options=options)
    begun(model, where=model / "checkpoints", name="last.pt")
    slurm.call("scancel", "--signal=TERM", job)
    [job] = slurm.wait(job)
    assert (job.state, job.code, job.restarts) == ("COMPLETED", 0, 1), job
    assert "exit code 143: once more" in job.log
    assert "resumed at step" in job.log
    assert json.loads((model / "metrics.json").read_text())["steps"] == 30
    assert mask.is_file()


def test_data_that_do_not_train_are_not_tried_again(slurm, tmp_path):
    (tmp_path / "data").mkdir()
    line = ("train.sbatch", tmp_path / "model", tmp_path / "data", *TRAIN)
    [job] = slurm.wait(slurm.submit(tmp_path, *line, options=["--ntasks-per-node=2"]))
    assert (job.state, job.code, job.restarts) == ("FAILED", 3, 0), job
