"""Trains a ShuffleNet on handwritten digits, or on a folder of images by class, in one process or in many.

    python examples/train.py --output run
    python examples/train.py --output run --images photos --model v1 --size 224 --workers 4
    torchrun --nproc-per-node 2 examples/train.py --output run

Takes the package's extra ``demo``. Into the output folder go ``checkpoint.pt``, ``history.json``, and at the end
``curves.png`` and ``model.pt``, the network's state_dict.

A run that is killed, at whatever moment, goes on where its last checkpoint is when it is started again, and ends with
the same bits as one that was not killed, given the same threads, backend and processes. Two things make it so. A
checkpoint is written aside and then renamed, so that there is always a whole one. And all that is random in a step
follows from the seed and the step's number, not from what was drawn before.
"""

import argparse
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.nn  # first imported by DistributedDataParallel, its defaults would keep a process group alive
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

import shufflenet_ext as se

CIFAR_MODELS = {"g2": se.models.ShuffleNetG2, "g3": se.models.ShuffleNetG3}  # for images of 32×32
MOMENTUM = 0.9
PART_HELD_OUT = 5  # each fifth image of a folder
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, which most weights are for
SMALLEST_CROP = 0.7  # of an image's shorter side: small networks learn little from smaller ones
MIDDLE = 0.875  # of the shorter side, of an image that is held out
# May change between a killed run and the one that goes on. All other options make another run.
FREE_OPTIONS = {"output", "threads", "workers", "backend", "checkpoint_every", "resume"}


class OptionError(Exception):
    """Says which option cannot be, what it was and what was expected."""


def random_of(*numbers: int) -> random.Random:
    """A generator for what these numbers name, such as a seed and a step."""
    return random.Random(" ".join(map(str, numbers)))


# --- The images ---


class Images(Protocol):
    """Labelled images; the first ``training`` ones are to train on, the others are held out."""

    classes: int
    training: int

    def __len__(self) -> int: ...

    def image(self, index: int, generator: random.Random | None) -> tuple[Tensor, int]:
        """An image (3, size, size) in float32 and its label; with a generator it is moved or cropped at random."""


class DigitImages:
    """scikit-learn's digits, shifted by up to a sixteenth of their size."""

    def __init__(self, size: int, limit: int | None) -> None:
        from shufflenet_ext import digits

        loaded = digits.load(size)
        self.classes, self._shifted, self._largest = digits.CLASSES, digits.shifted, size // 16
        self._images = torch.cat([loaded.train_images[:limit], loaded.test_images[:limit]])
        self._labels = torch.cat([loaded.train_labels[:limit], loaded.test_labels[:limit]]).tolist()
        self.training = len(loaded.train_labels[:limit])

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int, generator: random.Random | None) -> tuple[Tensor, int]:
        image = self._images[index]
        if generator is not None:
            top, left = (generator.randint(0, 2 * self._largest) for _ in range(2))
            image = self._shifted(image, top, left, self._largest)
        return image, self._labels[index]


class FolderImages:
    """The images of a folder that has a folder for each class: square crops, mirrored or not."""

    def __init__(self, folder: Path, size: int, limit: int | None) -> None:
        from PIL import Image

        known = Image.registered_extensions()
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in known
        ]
        random_of(0).shuffle(files)  # the same images are held out in every run
        held_out, rest = files[::PART_HELD_OUT], [file for i, file in enumerate(files) if i % PART_HELD_OUT]
        self._files = rest[:limit] + held_out[:limit]
        self.classes, self.training, self._size = len(names), len(rest[:limit]), size
        self._mean, self._deviation = (torch.tensor(each)[:, None, None] for each in (MEAN, DEVIATION))

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int, generator: random.Random | None) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        path, label = self._files[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        part, across, down = MIDDLE, 0.5, 0.5
        if generator is not None:
            part, across, down = generator.uniform(SMALLEST_CROP, 1), generator.random(), generator.random()
            image = ImageOps.mirror(image) if generator.random() < 0.5 else image
        side = part * min(image.size)
        left, top = across * (image.width - side), down * (image.height - side)
        box = (left, top, left + side, top + side)
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self._size, self._size, 3)
        return (pixels.permute(2, 0, 1) / 255 - self._mean) / self._deviation, label


class EpochImages(Dataset[tuple[Tensor, int]]):
    """Images by epoch and index, moved and cropped as they are in that epoch; in no epoch (None) as they are."""

    def __init__(self, images: Images, seed: int) -> None:
        self._images, self._seed = images, seed

    def __getitem__(self, place: tuple[int | None, int]) -> tuple[Tensor, int]:
        epoch, index = place
        return self._images.image(index, None if epoch is None else random_of(self._seed, epoch, index))


# --- The processes ---


@dataclass(frozen=True)
class Processes:
    """The processes that train together, of which this is one."""

    rank: int
    world: int
    device: torch.device

    def wrapped(self, model: nn.Module, synced: bool) -> nn.Module:
        """The model as it is trained; with ``synced``, batch norms take their statistics of all processes' images."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        if synced:
            # Behind the wrapping, as on a CPU DistributedDataParallel refuses to be made with one; the parameters stay.
            # There PyTorch's SyncBatchNorm takes no tensors, but this package's units and stems do without it.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return parallel

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums of each value over all processes, in all processes the same."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the running statistics of the first one, which are those that are saved."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def shared(self, value: Any) -> Any:
        """The value that the first process has."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values, 0)
        return values[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """This process alone, or those that torchrun started."""
    if not distributed.is_torchelastic_launched():
        yield Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


# --- The run ---


@dataclass
class Run:
    """All that a run is at a step's end: what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0  # the number of steps that were done; says the epoch and the place in it too
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of the epoch: loss, right ones, images
    history: list[dict[str, float]] = field(default_factory=list)  # of the epochs that were done

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return parts | {name: getattr(self, name) for name in ("step", "totals", "history")}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.totals, self.history = state["step"], state["totals"], state["history"]


def order_of(images: Images, options: argparse.Namespace, among: Processes, step: int) -> Iterator[tuple[int, int]]:
    """What this process trains on from a step on: epochs and indices. With any number of processes, step by step the
    same images."""
    sampler: DistributedSampler[int] = DistributedSampler(
        Subset(EpochImages(images, options.seed), range(images.training)),
        among.world,
        among.rank,
        seed=options.seed,
        drop_last=True,
    )
    steps_per_epoch, batch = images.training // options.batch, options.batch // among.world
    first_epoch, place = divmod(step, steps_per_epoch)
    for epoch in range(first_epoch, options.epochs):
        sampler.set_epoch(epoch)
        for index in list(sampler)[place * batch : steps_per_epoch * batch]:
            yield epoch, index
        place = 0


def model_of(options: argparse.Namespace, classes: int) -> nn.Module:
    """The network that the options name, with parameters of the seed."""
    torch.manual_seed(options.seed)
    if options.model == "v1":
        try:
            return se.models.shufflenet_v1(options.groups, options.width, classes)
        except ValueError as error:  # which begins with the argument's name
            raise OptionError(f"--{error}") from error
    model = CIFAR_MODELS[options.model]()
    model.linear = nn.Linear(model.linear.in_features, classes)
    return model


def new_run(model: nn.Module, options: argparse.Namespace, steps_per_epoch: int) -> Run:
    """SGD with Nesterov's momentum, and a learning rate that rises for some epochs and falls as a cosine then."""
    # Norms and biases are vectors: decay would only pull their channels to zero.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, options.learning_rate, momentum=MOMENTUM, nesterov=True)
    warm_up, total = options.warm_up * steps_per_epoch, options.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))

    return Run(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


def train_step(run: Run, parallel: nn.Module, batch: Sequence[Tensor], options: argparse.Namespace) -> list[float]:
    """One step. Returns the batch's sum of losses, the number of right answers, and the number of images."""
    images, labels = batch
    autocast = torch.autocast(images.device.type, torch.bfloat16) if options.bfloat16 else nullcontext()
    with autocast:
        logits = parallel(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.label_smoothing)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.schedule.step()
    run.step += 1
    return [loss.item() * len(labels), (logits.argmax(1) == labels).sum().item(), len(labels)]


def evaluate(model: nn.Module, held_out: Iterable[Sequence[Tensor]], among: Processes) -> tuple[float, float]:
    """The mean loss and the accuracy on the images that are held out."""
    among.share_buffers(model)
    model.eval()
    sums = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for batch in held_out:
            images, labels = (tensor.to(among.device) for tensor in batch)
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum").item()
            right = (logits.argmax(1) == labels).sum().item()
            sums = [sum(pair) for pair in zip(sums, (loss, right, len(labels)), strict=True)]
    model.train()
    loss, right, count = among.summed(sums)
    return loss / count, right / count


# --- What is written ---


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Writes a file that is whole or not there at any moment: aside, onto the disk, then renamed."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def save_checkpoint(run: Run, settings: dict[str, Any], output: Path) -> None:
    write_whole(output / "checkpoint.pt", lambda file: torch.save(run.state() | {"settings": settings}, file))


def load_checkpoint(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What the last checkpoint holds, None without one; OptionError where it is one of another run."""
    path = output / "checkpoint.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise OptionError(
                f"--{name.replace('_', '-')}: got {value}, but {path} is of a run with {state['settings'].get(name)}; "
                "expected the same, another --output, or --no-resume"
            )
    return state


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Losses and accuracies by epoch, as a picture; without matplotlib, a line that says so."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path.name}: it takes matplotlib, of the extra 'demo'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [row["epoch"] for row in history]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, what in zip(panels, ("loss", "accuracy"), strict=True):
        for part, colour in (("training", "#8b939f"), ("held-out", "#0b57a4")):
            panel.plot(epochs, [row[f"{part} {what}"] for row in history], color=colour, label=part, marker=".")
        panel.set(xlabel="epoch", title=what)
        panel.grid(color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_whole(path, lambda file: file.write(picture.getvalue()))


def write_history(run: Run, output: Path) -> None:
    text = json.dumps(run.history, indent=1).encode()
    write_whole(output / "history.json", lambda file: file.write(text))


@contextmanager
def progress(total: int, done: int, is_shown: bool) -> Iterator[tuple[Callable[[float], None], Callable[[str], None]]]:
    """Two functions: one to call with a step's loss, one that prints a line. The bar takes rich."""
    if not is_shown:
        yield lambda loss: None, lambda line: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda loss: None, lambda line: print(line, flush=True)
        return
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(TextColumn("step"), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=total, completed=done, loss=math.nan)
        yield (
            lambda loss: bar.update(task, advance=1, loss=loss),
            lambda line: bar.console.print(line, highlight=False, soft_wrap=True),
        )


# --- The command ---


def train(options: argparse.Namespace, among: Processes) -> None:
    """Trains to the end, from the last checkpoint on if there is one."""
    images = load_images(options)
    batch = options.batch // among.world
    if batch * among.world != options.batch:
        raise OptionError(f"--batch: got {options.batch}, expected a multiple of the {among.world} processes")
    steps_per_epoch = images.training // options.batch
    if steps_per_epoch == 0:
        raise OptionError(f"--batch: got {options.batch}, expected at most the {images.training} images to train on")
    settings = {name: str(value) for name, value in vars(options).items() if name not in FREE_OPTIONS}
    is_first = among.rank == 0
    if is_first:
        options.output.mkdir(parents=True, exist_ok=True)

    model = model_of(options, images.classes).to(among.device).train()
    run = new_run(model, options, steps_per_epoch)
    found = among.shared(load_checkpoint(options.output, settings) if is_first and options.resume else None)
    if found is not None:
        run.load(found)
    parallel = among.wrapped(model, options.sync_batch_norm)
    load = partial(
        DataLoader,
        EpochImages(images, options.seed),
        batch,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    held_out = load(sampler=[(None, i) for i in range(images.training + among.rank, len(images), among.world)])
    with progress(options.epochs * steps_per_epoch, run.step, is_first) as (show_loss, show):
        if run.step:
            show(f"goes on behind step {run.step}")
        start, first_step = time.perf_counter(), run.step
        for loaded in load(sampler=order_of(images, options, among, run.step)):
            # What a network might draw, as dropout does, follows from the step as well.
            torch.manual_seed(random_of(options.seed, run.step, among.rank).getrandbits(63))
            sums = among.summed(train_step(run, parallel, [tensor.to(among.device) for tensor in loaded], options))
            run.totals = [sum(pair) for pair in zip(run.totals, sums, strict=True)]
            show_loss(sums[0] / sums[2])
            is_epochs_end = run.step % steps_per_epoch == 0
            if is_epochs_end:
                images_a_second = (run.step - first_step) * options.batch / (time.perf_counter() - start)
                end_epoch(run, run.step // steps_per_epoch, evaluate(model, held_out, among), images_a_second)
                show(line_of(run.history[-1]))
            if is_first and (is_epochs_end or run.step % options.checkpoint_every == 0):
                save_checkpoint(run, settings, options.output)
            if is_epochs_end:
                if is_first:
                    write_history(run, options.output)
                start, first_step = time.perf_counter(), run.step
        if is_first:
            write_history(run, options.output)  # it may be that of a finished run that was killed here
            write_whole(options.output / "model.pt", lambda file: torch.save(model.state_dict(), file))
            draw_curves(run.history, options.output / "curves.png")
            show(f"wrote {options.output}")


def end_epoch(run: Run, epoch: int, held_out: tuple[float, float], images_a_second: float) -> None:
    """Adds an epoch to the history, with the loss and the accuracy on the images that are held out."""
    loss, right, count = run.totals
    run.history.append(
        {
            "epoch": epoch,
            "training loss": loss / count,
            "training accuracy": right / count,
            "held-out loss": held_out[0],
            "held-out accuracy": held_out[1],
            "learning rate": run.optimizer.param_groups[0]["lr"],
            "images a second": images_a_second,
        }
    )
    run.totals = [0.0, 0.0, 0.0]


def line_of(row: dict[str, float]) -> str:
    return (
        f"epoch {row['epoch']:.0f}: loss {row['training loss']:.4f}, held-out loss {row['held-out loss']:.4f}, "
        f"accuracy {row['held-out accuracy']:.2%}, {row['images a second']:.0f} images a second"
    )


def load_images(options: argparse.Namespace) -> Images:
    if options.images is None:
        try:
            return DigitImages(options.size, options.limit)
        except ModuleNotFoundError as error:
            message = f"--images: none was given, and the digits take {error.name}, of the extra 'demo'"
            raise OptionError(message) from error
    if not options.images.is_dir():
        raise OptionError(f"--images: got {options.images}, expected a folder")
    try:
        images = FolderImages(options.images, options.size, options.limit)
    except ModuleNotFoundError as error:
        raise OptionError("--images: to read them takes Pillow, of the extra 'demo'") from error
    if images.classes < 2 or images.training == 0:
        expected = "expected two folders or more, one a class, with images"
        raise OptionError(f"--images: {options.images} has {images.classes} folders, {len(images)} images; {expected}")
    return images


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of at least 0")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what is not given gets the value that it has for the model and the batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the folder to write to")
    add("--images", type=Path, help="a folder with a folder of images for each class; without it, digits")
    add("--limit", type=positive, help="so many images at most to train on, and so many held out")
    add("--size", type=positive, default=32, help="height and width that images are brought to (%(default)s)")
    add("--model", choices=[*CIFAR_MODELS, "v1"], default="g3", help="g2, g3: for 32×32; v1: the paper's (%(default)s)")
    add("--groups", type=int, default=3, help="of --model v1 (%(default)s)")
    add("--width", type=float, default=1.0, help="of --model v1 (%(default)s)")
    add("--epochs", type=positive, default=10, help="(%(default)s)")
    add("--batch", type=positive, default=64, help="images a step, of all processes together (%(default)s)")
    add("--learning-rate", type=not_negative, help="the highest one; by default the paper's, 0.5 for a batch of 1024")
    add("--warm-up", type=not_negative, default=1.0, help="epochs in which it rises (%(default)s)")
    add("--weight-decay", type=not_negative, default=4e-5, help="of weights, not of norms (%(default)s, the paper's)")
    add("--label-smoothing", type=not_negative, default=0.1, help="(%(default)s)")
    add("--bfloat16", action="store_true", help="train under autocast to bfloat16")
    add("--sync-batch-norm", action="store_true", help="norms take the statistics of all processes' images")
    add("--backend", choices=["auto", "native", "reference"], default="auto", help="see shufflenet_ext.use_backend")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--threads", type=positive, help="of each process; by default PyTorch's choice")
    add("--workers", type=positive, default=0, help="processes that read images, for each that trains (%(default)s)")
    add("--checkpoint-every", type=positive, default=100, metavar="STEPS", help="and at each epoch's end (%(default)s)")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where the output folder has a checkpoint; --no-resume starts anew",
    )
    options = parser.parse_args(arguments)
    if options.model in CIFAR_MODELS and options.size != 32:
        parser.error(f"argument --size: got {options.size}, expected 32 with --model {options.model}")
    if options.label_smoothing > 1:
        parser.error(f"argument --label-smoothing: got {options.label_smoothing}, expected 0 to 1")
    if options.learning_rate is None:
        options.learning_rate = 0.5 * options.batch / 1024
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with processes() as among, se.use_backend(options.backend):
        try:
            train(options, among)
        except OptionError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
