"""The commands that train: data, finetune, compare."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.app import Device, Json, Overwrite, app
from vitscope.cli.output import WIDE, fresh, load_model, print_table, save, split_list
from vitscope.errors import CallError, OutputExistsError, WorkError

if TYPE_CHECKING:
    from vitscope.tune.data import Data
    from vitscope.tune.inspecting import Inspection
    from vitscope.tune.runs import Tuned

DataName = Annotated[
    str,
    typer.Argument(
        help="A folder with a folder of pictures for each class, cifar10, fashion-mnist, eurosat, brain-mri, "
        "birds-525, or owner/name of the hub.",
        metavar="DATA",
        show_default=False,
    ),
]
TestShare = Annotated[float, typer.Option(help="Of each class, where the data set has no split.")]
SplitSeed = Annotated[int, typer.Option(help="Of the split and of --per-class.")]
PerClass = Annotated[int | None, typer.Option(help="At most so many training pictures of a class.", show_default="all")]
Unreadable = Annotated[Literal["refuse", "skip"], typer.Option(help="Pictures that cannot be read.")]
DropDuplicates = Annotated[
    bool, typer.Option("--drop-duplicates", help="Leave out training pictures that are in the test set too.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="report, modern, or a TOML file.")]
Epochs = Annotated[int | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
LearningRate = Annotated[float | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
BatchSize = Annotated[int | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the forward.", show_default="the recipe's"),
]
EarlyStop = Annotated[
    int | None, typer.Option(help="Epochs without a better validation accuracy; holds out a tenth of train.")
]
Rank = Annotated[int | None, typer.Option(help="Of adapters and LoRA.", show_default="64 and 8")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side of the input.", show_default="the model's")]
READING = "reading pictures"
HELD_OUT = 0.1  # of the training pictures, for early stopping

Folder = Annotated[
    Path | None, typer.Option("--out", "-o", help="The folder of the run.", show_default="named after data and model")
]


@app.command()
def data(
    data: DataName,
    test_share: TestShare = 0.2,
    split_seed: SplitSeed = 0,
    per_class: PerClass = None,
    threshold: Annotated[float, typer.Option(help="Correlation from which two pictures are near duplicates.")] = 0.99,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The PNG to write.", show_default="a new name")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Classes and counts of a data set, pictures that leak from train to test, the mean picture of each class."""
    from vitscope.methods.asking import telling
    from vitscope.tune.data import load_data
    from vitscope.tune.inspecting import inspect
    from vitscope.tune.showing import data_scene

    path = out or fresh(f"{_name(data)}-data")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already: pass --overwrite or another --out")
    if path.suffix.lower() != ".png":
        raise CallError(f"--out is {path}: figures are PNG, end the name in .png")
    loaded = load_data(data, test_share=test_share, seed=split_seed, per_class=per_class)
    with telling(not json_, READING) as tell:
        found = inspect(loaded, threshold=threshold, progress=tell)
    save(data_scene(found), path, overwrite)
    if json_:
        typer.echo(json.dumps({**found.as_json(), "figure": str(path)}, indent=2))
        return
    _print_data(found)
    typer.echo(f"wrote {path}")


@app.command()
def finetune(
    data: DataName,
    model: Annotated[str, typer.Option("--model", "-m", help="What is tuned; as for explain.")] = "vit-nano",
    tuning: Annotated[
        str,
        typer.Option(
            "--tuning",
            "-t",
            help="What learns: head, full, bitfit, layernorm, adapter-attention, adapter-mlp, adapter-both, "
            "adapter-parallel, lora, window-cls.",
        ),
    ] = "head",
    recipe: RecipeName = "modern",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    precision: Precision = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches to a step.", show_default="the recipe's")] = None,
    early_stop: EarlyStop = None,
    rank: Rank = None,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    test_share: TestShare = 0.2,
    split_seed: SplitSeed = 0,
    per_class: PerClass = None,
    unreadable: Unreadable = "refuse",
    drop_duplicates: DropDuplicates = False,
    image_size: ImageSize = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="an epoch's")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write logs for TensorBoard.")] = False,
    out: Folder = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Train a model on pictures of your own; the same call goes on where it was broken off."""
    from vitscope.tune.tunings import known_tuning

    known_tuning(tuning)  # before the engine is imported, which takes seconds
    from vitscope.tune.finetuning import finetune as tune
    from vitscope.tune.showing import run_scene

    base = load_model(model, device, (), image_size=image_size)
    folder = out or Path(f"{_name(data)}-{Path(model).name.replace(':', '-')}-{tuning}")
    changes: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "precision": precision,
        "accumulate": accumulate,
        "early_stop": early_stop,
        "validation": None if early_stop is None else HELD_OUT,
        "seed": seed,
    }
    pictures = _read(data, test_share, split_seed, per_class, unreadable, drop_duplicates, shown=not json_)
    steps: list[float] = []

    def told(found: Mapping[str, float | int]) -> None:
        steps.append(found["step"])
        tell(f"{base.name}, {tuning}", found)

    with _training(not json_) as tell:
        tuned = tune(
            base,
            pictures,
            out=folder,
            tuning=tuning,
            recipe=recipe,
            rank=rank,
            save_steps=save_steps,
            tensorboard=tensorboard,
            overwrite=overwrite,
            device=device,
            progress=told,
            **changes,
        )
    if not _is_first():
        return
    report = folder / "report.png"
    if steps or not report.exists():
        save(run_scene(tuned), report, overwrite=True)
    if json_:
        left_out = {"said", "truth", "history"}
        about = {name: value for name, value in tuned.about.items() if name not in left_out}
        typer.echo(json.dumps({**about, "folder": str(folder)}, indent=2))
        return
    _print_tuned(tuned)
    done = f"wrote {folder}" if steps else f"{folder} was finished before"
    typer.echo(f"{done}: explain it with --model {folder}")


@app.command()
def compare(
    data: DataName,
    models: Annotated[str, typer.Option("--models", "-m", help="With commas between them.")] = "vit-nano,swin-nano",
    tunings: Annotated[
        str, typer.Option("--tunings", "-t", help="With commas between them.")
    ] = "head,adapter-mlp,lora",
    seeds: Annotated[int, typer.Option(help="How many, counted from 0.")] = 3,
    recipe: RecipeName = "modern",
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    precision: Precision = None,
    early_stop: EarlyStop = None,
    rank: Rank = None,
    test_share: TestShare = 0.2,
    split_seed: SplitSeed = 0,
    per_class: PerClass = None,
    unreadable: Unreadable = "refuse",
    drop_duplicates: DropDuplicates = False,
    image_size: ImageSize = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep every cell's model.")] = False,
    out: Folder = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Models by ways to tune by seeds: accuracies, who gains more, and what tuning did to attention."""
    from rich.console import Console

    from vitscope.tune.tunings import known_tuning

    chosen = split_list(tunings)
    for tuning in chosen:
        known_tuning(tuning)  # before the engine is imported, which takes seconds
    from vitscope.methods.asking import telling
    from vitscope.tune.comparing import compare as run
    from vitscope.tune.data import load_data
    from vitscope.tune.inspecting import inspect
    from vitscope.tune.page import INTERACTION_HEADER, SUMMARY_HEADER, interaction_rows, summary_rows, write_page

    folder = out or Path(f"{_name(data)}-comparison")
    loaded = [load_model(name, device, (), image_size=image_size) for name in split_list(models)]
    pictures = load_data(data, test_share=test_share, seed=split_seed, per_class=per_class)
    with telling(not json_, READING) as tell:
        inspection = inspect(pictures, progress=tell)
    with _training(not json_) as told:
        result = run(
            inspection,
            loaded,
            out=folder,
            tunings=chosen,
            seeds=seeds,
            recipe=recipe,
            rank=rank,
            unreadable=unreadable,
            drop_duplicates=drop_duplicates,
            keep_models=keep_models,
            device=device,
            progress=told,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            precision=precision,
            early_stop=early_stop,
            validation=HELD_OUT if early_stop is not None else None,
        )
    if not _is_first():
        return
    written = write_page(result, folder)
    if json_:
        typer.echo(json.dumps({**result.as_json(), "files": [str(path) for path in written]}, indent=2))
        return
    shown = range(len(SUMMARY_HEADER)) if Console().width >= WIDE else (0, 1, 2, 3, 5)
    rows = [tuple(row[at] for at in shown) for row in summary_rows(result)]
    print_table([SUMMARY_HEADER[at] for at in shown], rows, right=range(2, len(shown)))
    between = interaction_rows(result)
    if between:
        print_table(INTERACTION_HEADER, between, right=(2, 3))
    typer.echo(f"wrote {written[0]} and {len(written) - 1} figures beside it")


def _name(data: str) -> str:
    """The last part of a data set's name, also of "." and ".."."""
    path = Path(data)
    return path.resolve().name if path.name in ("", "..") else path.name


def _is_first() -> bool:
    """Of several processes that train together, the first one writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def _read(
    name: str,
    test_share: float,
    seed: int,
    per_class: int | None,
    unreadable: str,
    drop_duplicates: bool,
    *,
    shown: bool,
) -> "Data":
    from vitscope.methods.asking import telling
    from vitscope.tune.data import load_data
    from vitscope.tune.inspecting import inspect, usable

    loaded = load_data(name, test_share=test_share, seed=seed, per_class=per_class)
    with telling(shown, READING) as tell:
        found = inspect(loaded, progress=tell)
    return usable(found, unreadable=unreadable, drop_duplicates=drop_duplicates)


@contextmanager
def _training(shown: bool) -> Iterator[Callable[[str, Mapping[str, float | int]], None]]:
    """On stderr what is trained, steps, the accuracy of the last epoch: a bar, or where none can be a line an epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    last: list[object] = []
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("training", total=None, accuracy="")

        def tell(what: str, found: Mapping[str, float | int]) -> None:
            accuracy = found["accuracy"]
            known = "" if accuracy != accuracy else f"accuracy {accuracy:.1%}"
            bar.update(task, description=what, completed=found["step"], total=found["steps"], accuracy=known)
            evaluated = [what, found["step"]] == last  # a step is told of again when its epoch has been evaluated
            if evaluated and shown and not console.is_terminal:
                typer.echo(f"{what}: step {found['step']} of {found['steps']}, {known}", err=True)
            last[:] = [what, found["step"]]

        try:
            yield tell
        except KeyboardInterrupt:
            raise WorkError("interrupted; the same command goes on from where it was") from None


def _print_data(found: "Inspection") -> None:
    from vitscope.tune.inspecting import counted

    rows = [(label, f"{train:,}", f"{test:,}") for label, (train, test) in found.data.counts().items()]
    print_table(("class", "train", "test"), rows, right=(1, 2))
    labels = f", {found.contradictions} of them with different labels" if found.leaking else ""
    repeated = f"{counted(found.repeated, 'training picture')} {'is' if found.repeated == 1 else 'are'} repeated"
    typer.echo(f"{found.leaks_told()}{labels}; {repeated}")
    typer.echo(
        f"the class of the most similar training picture is right for {found.nearest:.1%} of the test pictures, "
        f"{found.nearest_without:.1%} without duplicates"
    )
    if found.unreadable:
        typer.echo(f"{counted(len(found.unreadable), 'file')} counted above cannot be read as a picture")
    for _, _, reason in found.unreadable[:10]:
        typer.echo(f"unreadable: {reason}")
    if len(found.unreadable) > 10:
        typer.echo(f"and {len(found.unreadable) - 10} more that cannot be read")


def _print_tuned(tuned: "Tuned") -> None:
    from vitscope.tune.showing import short_name

    about, others = tuned.about, bool(tuned.about["trained"])
    low, high = about["interval"]
    rows = [
        ("test accuracy", f"{about['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}"),
        ("macro F1", f"{about['macro_f1']:.3f}"),
        ("trained", f"{about['head']:,} weights of the classifier" + (f" and {about['trained']:,} others" * others)),
        ("time", f"{about['seconds']:.0f} s, {about['peak_mib']:.0f} MiB at the peak"),
    ]
    print_table(("", f"{short_name(about['model'])}, {about['tuning']}, on {about['data']}"), rows, right=())
