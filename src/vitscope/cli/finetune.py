"""vitscope finetune"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.app import app
from vitscope.cli.inputs import load_model
from vitscope.cli.options import Device, Json, Overwrite
from vitscope.cli.output import save
from vitscope.cli.tables import print_table

if TYPE_CHECKING:
    from vitscope.tune.run_folder import Tuned
from vitscope.cli.training import (
    HELD_OUT,
    BatchSize,
    DataName,
    DropDuplicates,
    EarlyStop,
    Epochs,
    Folder,
    ImageSize,
    LearningRate,
    PerClass,
    Precision,
    Rank,
    RecipeName,
    SplitSeed,
    TestShare,
    Unreadable,
    data_name,
    is_first_process,
    read_data,
    training_progress,
)


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
    """Fine-tune a model on your images; resumes if interrupted."""
    from vitscope.tune.methods import require_tuning

    require_tuning(tuning)  # before the engine is imported, which takes seconds
    from vitscope.tune.finetune import finetune as tune
    from vitscope.views.tuning import run_scene

    base = load_model(model, device, (), image_size=image_size)
    folder = out or Path(f"{data_name(data)}-{Path(model).name.replace(':', '-')}-{tuning}")
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
    images = read_data(data, test_share, split_seed, per_class, unreadable, drop_duplicates, shown=not json_)
    steps: list[float] = []

    def told(found: Mapping[str, float | int]) -> None:
        steps.append(found["step"])
        tell(f"{base.name}, {tuning}", found)

    with training_progress(not json_) as tell:
        tuned = tune(
            base,
            images,
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
    if not is_first_process():
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


def _print_tuned(tuned: "Tuned") -> None:
    from vitscope.views.tuning import short_name

    about, others = tuned.about, bool(tuned.about["trained"])
    low, high = about["interval"]
    rows = [
        ("test accuracy", f"{about['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}"),
        ("macro F1", f"{about['macro_f1']:.3f}"),
        ("trained", f"{about['head']:,} weights of the classifier" + (f" and {about['trained']:,} others" * others)),
        ("time", f"{about['seconds']:.0f} s, {about['peak_mib']:.0f} MiB at the peak"),
    ]
    print_table(("", f"{short_name(about['model'])}, {about['tuning']}, on {about['data']}"), rows, right=())
