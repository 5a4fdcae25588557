"""The command ``vitscope finetune``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.json_output import print_results
from vitscope.cli.options import Device, ImageSize, Json, ModelName, Overwrite, option
from vitscope.cli.output import save
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_table
from vitscope.cli.training import (
    DataName,
    DataSettings,
    Folder,
    Rank,
    RecipeName,
    RunSettings,
    data_name,
    hold_out,
    is_first_process,
    training_command,
    training_progress,
)

if TYPE_CHECKING:
    from vitscope.progress import Progress
    from vitscope.tune.run_folder import Tuned
    from vitscope.views.style import FigureStyle

NOT_PRINTED = {"predictions", "true_labels", "history"}  # long lists


@training_command
@drawing
def finetune(
    data: DataName,
    *,
    model: ModelName = "vit-nano",
    tuning: Annotated[str, option("--tuning")] = "head",
    recipe: RecipeName = "modern",
    changes: RunSettings,
    rank: Rank = None,
    data_options: DataSettings,
    image_size: ImageSize = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default="one epoch")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write logs for TensorBoard.")] = False,
    out: Folder = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    style: "FigureStyle | None",
) -> None:
    """Fine-tune a model on your images; resumes if interrupted."""
    from vitscope.tune.methods import require_tuning

    require_tuning(tuning)  # before the engine is imported, which takes seconds
    from vitscope.tune.finetune import finetune as tune
    from vitscope.views.tuning import run_scene

    base = load_model(model, device, image_size=image_size)
    folder = out or Path(f"{data_name(data)}-{Path(model).name.replace(':', '-')}-{tuning}")
    trained = False

    def show_step(step: "Progress") -> None:
        nonlocal trained
        if step.metrics:
            trained, step = True, replace(step, description=f"{base.name}, {tuning}")
        show(step)

    with training_progress(not json_ and is_first_process()) as show:
        tuned = tune(
            base,
            data,
            out=folder,
            tuning=tuning,
            recipe=recipe,
            rank=rank,
            data_options=data_options,
            save_steps=save_steps,
            tensorboard=tensorboard,
            overwrite=overwrite,
            device=device,
            progress=show_step,
            **hold_out(changes),
        )
    if not is_first_process():
        return
    report = folder / "report.png"
    if trained or not report.exists():
        save(run_scene(tuned), report, True, style)
    if json_:
        record = {name: value for name, value in tuned.record.items() if name not in NOT_PRINTED}
        print_results("finetune", [{**record, "folder": str(folder)}])
        return
    _print_tuned(tuned)
    if tuned.warning is not None:
        typer.echo(f"warning: {tuned.warning}")
    status = f"wrote {folder}" if trained else f"{folder} was finished before"
    typer.echo(f"{status}: explain it with --model {folder}")


def _print_tuned(tuned: "Tuned") -> None:
    """Print accuracy, baselines, recipe, F1, number of trained weights, time and memory."""
    from vitscope.tune.baselines import describe_baselines
    from vitscope.tune.run_folder import describe_recipe
    from vitscope.views.tuning import short_name

    record = tuned.record
    low, high = record["interval"]
    others = f" and {record['num_trained']:,} others" if record["num_trained"] else ""
    rows = [
        ("test accuracy", f"{record['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}"),
        ("without tuning", describe_baselines(record)),
        ("recipe", describe_recipe(record)),
        ("macro F1", f"{record['macro_f1']:.3f}"),
        ("trained", f"{record['num_head']:,} weights of the classifier{others}"),
        ("time", f"{record['seconds']:.0f} s, {record['peak_mib']:.0f} MiB at the peak"),
    ]
    print_table(("", f"{short_name(record['model'])}, {record['tuning']}, on {record['data']}"), rows, right=())
