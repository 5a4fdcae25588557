"""vitscope compare"""

import json
from pathlib import Path
from typing import Annotated

import typer

from vitscope.cli.app import app
from vitscope.cli.inputs import load_model, split_list
from vitscope.cli.options import Device, Json
from vitscope.cli.tables import WIDE, print_table
from vitscope.cli.training import (
    HELD_OUT,
    READING,
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
    training_progress,
)


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
    """Fine-tune several models by several methods; compare them."""
    from rich.console import Console

    from vitscope.tune.methods import require_tuning

    chosen = split_list(tunings)
    for tuning in chosen:
        require_tuning(tuning)  # before the engine is imported, which takes seconds
    from vitscope.methods._perturbation import progress_bar
    from vitscope.tune.comparison import compare as run
    from vitscope.tune.data import load_data
    from vitscope.tune.leakage import inspect
    from vitscope.views.comparison_page import (
        INTERACTION_HEADER,
        SUMMARY_HEADER,
        interaction_rows,
        summary_rows,
        write_page,
    )

    folder = out or Path(f"{data_name(data)}-comparison")
    loaded = [load_model(name, device, (), image_size=image_size) for name in split_list(models)]
    images = load_data(data, test_share=test_share, seed=split_seed, per_class=per_class)
    with progress_bar(not json_, READING) as tell:
        inspection = inspect(images, progress=tell)
    with training_progress(not json_) as told:
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
    if not is_first_process():
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
