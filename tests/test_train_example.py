"""examples/train.py: what it writes, that a killed run loses nothing, and several processes."""

import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import shufflenet_ext as se

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train.py"
pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT))
from examples import train  # noqa: E402

# Networks have as few units as they can, so that a step takes some hundredths of a second.
REPEATS = (2, 1, 1)
SMALL = ["--model=v1", "--groups=1", "--width=0.25", "--batch=16", "--threads=1", "--learning-rate=0.02"]
TIMES = "images a second"


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have their imports behind them; each is a real one, to be killed."""
    context = multiprocessing.get_context("forkserver")
    # The server imports by the environment alone. The last three are imported as late as they are used.
    context.set_forkserver_preload(
        ["test_train_example", "shufflenet_ext.digits", "torch._dynamo", "matplotlib.pyplot"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


def run(processes, output, *arguments, before=None):
    """Starts the example in a process of its own, which calls ``before`` first."""
    process = processes.Process(target=main, args=([f"--output={output}", *SMALL, *arguments], before))
    process.start()
    return process


def main(arguments, before):
    se.models.REPEATS = REPEATS
    if before is not None:
        before()
    train.main(arguments)


def finish(process):
    process.join(120)
    assert process.exitcode == 0


def results(output):
    """The parameters and buffers, and the history without its times."""
    history = json.loads((output / "history.json").read_text())
    for row in history:
        assert row.pop(TIMES) > 0
    return torch.load(output / "model.pt"), history


def assert_same_results(output, expected):
    (model, history), (expected_model, expected_history) = results(output), results(expected)
    assert history == expected_history
    assert model.keys() == expected_model.keys()
    for name, value in expected_model.items():
        assert torch.equal(model[name], value), name


def kill_at_random(process, checkpoint, generator, most):
    """Kills the process some steps on, at a random moment; returns whether it still ran."""
    deadline = time.monotonic() + 60
    for _ in range(generator.randint(0, most)):  # so many new checkpoints
        before = identity(checkpoint)
        while identity(checkpoint) == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def identity(path):
    try:
        return path.stat().st_mtime_ns, path.stat().st_ino
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_that_is_killed_loses_nothing(processes, kills, tmp_path):
    # Five steps for each kill, more than go by until it comes.
    options = ["--limit=80", f"--epochs={2 + kills}", "--checkpoint-every=1"]
    finish(run(processes, tmp_path / "whole", *options))
    generator = random.Random(0)
    killed = 0
    for _ in range(kills):
        process = run(processes, tmp_path / "killed", *options)
        killed += kill_at_random(process, tmp_path / "killed" / "checkpoint.pt", generator, most=2)
    assert killed == kills
    finish(run(processes, tmp_path / "killed", *options))
    assert_same_results(tmp_path / "killed", tmp_path / "whole")


class KilledAt:
    """Kills its process when it calls a function of os for the n-th time, ahead of it or behind it."""

    def __init__(self, name, n, is_behind):
        self.name, self.left, self.is_behind = name, n, is_behind

    def __call__(self):
        self.real = getattr(os, self.name)
        setattr(os, self.name, self.called)

    def called(self, *arguments):
        self.left -= 1
        if self.left == 0 and not self.is_behind:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.real(*arguments)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def kill_half_way_through_a_checkpoint():
    save = torch.save

    def save_half(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def test_a_run_that_is_killed_as_it_writes(processes, tmp_path):
    options = ["--limit=48", "--epochs=2", "--checkpoint-every=2"]
    finish(run(processes, tmp_path / "whole", *options))
    moments = [KilledAt(name, 2, is_behind) for name in ("fsync", "replace") for is_behind in (False, True)]
    moments.insert(1, kill_half_way_through_a_checkpoint)
    for moment in moments:
        process = run(processes, tmp_path / "killed", *options, before=moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert (tmp_path / "killed" / "checkpoint.pt").exists()
    finish(run(processes, tmp_path / "killed", *options))
    assert_same_results(tmp_path / "killed", tmp_path / "whole")
    finished = (tmp_path / "killed" / "checkpoint.pt").stat().st_mtime_ns
    finish(run(processes, tmp_path / "killed", *options))  # there is nothing left to do
    assert (tmp_path / "killed" / "checkpoint.pt").stat().st_mtime_ns == finished


class AsTorchrun:
    """Sets the environment of one of several processes as torchrun does."""

    def __init__(self, rank, world, port):
        self.environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        self.environment |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}

    def __call__(self):
        os.environ.update({name: str(value) for name, value in self.environment.items()})


def run_together(processes, output, *arguments, world=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [run(processes, output, *arguments, before=AsTorchrun(rank, world, port)) for rank in range(world)]


@pytest.mark.parametrize("is_synced", [False, True])
def test_two_processes_take_halves_of_a_batch(processes, is_synced, tmp_path, monkeypatch):
    monkeypatch.setattr(se.models, "REPEATS", REPEATS)
    arguments = ["--limit=16", "--epochs=1", "--warm-up=0", *(["--sync-batch-norm"] if is_synced else [])]
    for process in run_together(processes, tmp_path, *arguments):
        finish(process)
    (trained, history) = results(tmp_path)

    options = train.parse([f"--output={tmp_path}", *SMALL, *arguments])
    images = train.DigitImages(options.size, options.limit)
    model = train.model_of(options, images.classes).train()
    one = train.new_run(model, options, steps_per_epoch=1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(options.seed))  # DistributedSampler's
    drawn = train.EpochImages(images, options.seed)
    halves = [torch.stack([drawn[0, i][0] for i in half.tolist()]) for half in (order[::2], order[1::2])]
    labels = torch.tensor([drawn[0, i][1] for half in (order[::2], order[1::2]) for i in half.tolist()])

    parts = [model(torch.cat(halves))] if is_synced else [model(half) for half in halves]
    loss = F.cross_entropy(torch.cat(parts), labels, label_smoothing=options.label_smoothing)
    loss.backward()
    one.optimizer.step()
    assert history[0]["training loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in model.named_parameters():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)
    if is_synced:
        for name, value in model.named_buffers():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.long)])
def test_processes_that_are_killed_together(processes, kills, tmp_path):
    options = ["--limit=48", f"--epochs={2 + kills}", "--checkpoint-every=1", "--sync-batch-norm"]
    for process in run_together(processes, tmp_path / "whole", *options):
        finish(process)
    generator, killed = random.Random(1), 0
    for _ in range(kills):
        first, second = run_together(processes, tmp_path / "killed", *options)
        killed += kill_at_random(first, tmp_path / "killed" / "checkpoint.pt", generator, most=2)
        second.kill()
        second.join()
    assert killed == kills
    for process in run_together(processes, tmp_path / "killed", *options):
        finish(process)
    assert_same_results(tmp_path / "killed", tmp_path / "whole")


def command(*arguments, launcher=(), script=SCRIPT):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=False)


def assert_wrote_all(output, epochs):
    assert {path.name for path in output.iterdir()} == {"checkpoint.pt", "curves.png", "history.json", "model.pt"}
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    _, history = results(output)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    rates = [row["learning rate"] for row in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0


def test_what_is_written(processes, tmp_path):
    finish(run(processes, tmp_path, "--limit=16", "--epochs=3", "--warm-up=0.5", "--bfloat16", "--backend=native"))
    assert_wrote_all(tmp_path, 3)


@pytest.mark.long
def test_the_command(tmp_path):
    done = command("--output", tmp_path, *SMALL, "--epochs=2", "--limit=48", "--backend=native")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images a second") == 2
    assert_wrote_all(tmp_path, 2)


# Runs the example as the main program, then names the threads of gloo that are left.
WITH_THREADS_LEFT = f"""
import runpy
from pathlib import Path

runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print("left:", [name for name in names if "gloo" in name])
"""


@pytest.mark.long
def test_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(WITH_THREADS_LEFT)
    done = command("--output", output, *SMALL, "--epochs=2", "--limit=64", launcher=launcher, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2:") == 1  # by the first process alone
    assert len(results(output)[1]) == 2
    # One that is left may want Python's lock once Python has ended, which aborts the process.
    assert done.stdout.count("left: []") == 2, done.stdout


@pytest.fixture
def folder(tmp_path):
    """Images of three classes, by their colours, of several sizes and formats."""
    image = pytest.importorskip("PIL.Image")
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            colour = [40, 40, 40]
            colour[channel] = 160 + 8 * i
            size = (40 + i, 50 - i)
            mode = "RGBA" if i % 2 else "RGB"
            suffix = "png" if i % 2 else "jpeg"
            image.new(mode, size, tuple(colour)).save(tmp_path / "images" / name / f"{i}.{suffix}")
        (tmp_path / "images" / name / "notes.txt").write_text("no image")
    return tmp_path / "images"


def start_by_fork():
    """Lets a process start others without importing everything anew."""
    multiprocessing.set_start_method("fork", force=True)


def test_a_folder_of_images(folder, processes, tmp_path):
    arguments = [f"--images={folder}", "--size=48", "--epochs=6", "--batch=14"]
    finish(run(processes, tmp_path / "run", *arguments))
    _, history = results(tmp_path / "run")
    assert history[-1]["training loss"] < history[0]["training loss"]
    assert history[-1]["held-out accuracy"] > 0.6
    finish(run(processes, tmp_path / "workers", *arguments, "--workers=1", before=start_by_fork))
    assert_same_results(tmp_path / "workers", tmp_path / "run")
    images = train.FolderImages(folder, 48, None)
    assert (images.classes, images.training, len(images)) == (3, 28, 36)
    plain, label = images.image(30, None)
    assert plain.shape == (3, 48, 48)
    assert plain.mean((1, 2)).argmax() == 2 - label  # the classes are blue, green and red, the channels are not
    assert torch.equal(plain, images.image(30, None)[0])
    assert torch.equal(images.image(3, train.random_of(1))[0], images.image(3, train.random_of(1))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "argument --batch: got 0, expected at least 1"),
        (["--learning-rate=-1"], "argument --learning-rate: got -1, expected a number of at least 0"),
        (["--label-smoothing=2"], "argument --label-smoothing: got 2.0, expected 0 to 1"),
        (["--model=g3", "--size=64"], "argument --size: got 64, expected 32 with --model g3"),
        (["--groups=5"], "--groups: got 5, expected one of"),
        (["--limit=9"], "--batch: got 16, expected at most the 9 images to train on"),
        (["--images=nowhere"], "--images: got nowhere, expected a folder"),
    ],
    ids=str,
)
def test_errors_name_the_option(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--output={tmp_path}", *SMALL, *arguments])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_a_folder_without_classes(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(SystemExit, match="has 0 folders, 0 images; expected two folders or more"):
        train.main([f"--output={tmp_path / 'run'}", f"--images={tmp_path}", *SMALL])


def test_what_is_not_installed_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit, match="--images: to read them takes Pillow, of the extra 'demo'"):
        train.main([f"--output={tmp_path}", f"--images={folder}"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "shufflenet_ext.digits", raising=False)
    monkeypatch.delattr("shufflenet_ext.digits", raising=False)
    with pytest.raises(SystemExit, match=r"the digits take sklearn.*, of the extra 'demo'"):
        train.main([f"--output={tmp_path}"])


def test_another_run_does_not_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(se.models, "REPEATS", REPEATS)
    arguments = [f"--output={tmp_path}", *SMALL, "--limit=16", "--epochs=1"]
    train.main(arguments)
    with pytest.raises(SystemExit, match=r"--seed: got 1, but .*checkpoint\.pt is of a run with 0"):
        train.main([*arguments, "--seed=1"])
    train.main([*arguments, "--seed=1", "--no-resume"])
