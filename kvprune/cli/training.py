"""Commands that train, or measure what a policy needs of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import KVPruneError
from .given import at_least, model_path, percent, read_text

_DATA, _HEADS, _LOSSES, _STEPS = "Data", "Heads", "Losses", "Steps"
"""The parts of a long list of options."""


def train_sdtp(
    model: Annotated[str, typer.Option(help="Name or path of the model.", rich_help_panel=_DATA)],
    data: Annotated[
        str, typer.Option(help="Texts, JSON lines, a folder, a data set.", rich_help_panel=_DATA)
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is made.", rich_help_panel=_DATA)],
    tokens: Annotated[int, typer.Option(help="Most of an example.", rich_help_panel=_DATA)] = 1024,
    completion: Annotated[
        int, typer.Option(help="Tokens of a text's end to predict.", rich_help_panel=_DATA)
    ] = 64,
    limit: Annotated[
        int | None, typer.Option(help="Use only so many examples.", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="As --data; else a share of it.", rich_help_panel=_DATA)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=_DATA)
    ] = "auto",
    keep: Annotated[
        float, typer.Option(help="Share that a stage keeps.", rich_help_panel=_HEADS)
    ] = 0.9,
    stages: Annotated[
        int | None, typer.Option(help="How many; as many as fit.", rich_help_panel=_HEADS)
    ] = None,
    query_heads: Annotated[
        int, typer.Option(help="Low-rank term; the paper has 0.", rich_help_panel=_HEADS)
    ] = 4,
    target: Annotated[
        str, typer.Option(help="removal; gradient (paper's).", rich_help_panel=_LOSSES)
    ] = "removal",
    listwise: Annotated[
        float, typer.Option(help="Weight; 0 leaves it out.", rich_help_panel=_LOSSES)
    ] = 1.0,
    ranking: Annotated[
        float, typer.Option(help="Likewise; the paper's.", rich_help_panel=_LOSSES)
    ] = 0.0,
    mse: Annotated[
        float, typer.Option(help="Likewise; the paper's.", rich_help_panel=_LOSSES)
    ] = 0.0,
    cross_entropy: Annotated[float, typer.Option(help="Likewise.", rich_help_panel=_LOSSES)] = 1.0,
    distillation: Annotated[float, typer.Option(help="Likewise.", rich_help_panel=_LOSSES)] = 1.0,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs to rank a stage by; all.", rich_help_panel=_LOSSES)
    ] = None,
    marking_epochs: Annotated[
        int, typer.Option(help="Through the dense model.", rich_help_panel=_STEPS)
    ] = 3,
    pruning_epochs: Annotated[
        int, typer.Option(help="Through the pruned model.", rich_help_panel=_STEPS)
    ] = 0,
    learning_rate: Annotated[
        float, typer.Option(help="The highest.", rich_help_panel=_STEPS)
    ] = 1e-3,
    batch: Annotated[int, typer.Option(help="Examples per step.", rich_help_panel=_STEPS)] = 2,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no or bf16; accelerate's.", rich_help_panel=_STEPS)
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Measure each so many steps too.", rich_help_panel=_STEPS)
    ] = None,
    keep_hidden: Annotated[
        bool,
        typer.Option(
            "--keep-hidden", help="On disk: later epochs read it.", rich_help_panel=_STEPS
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", rich_help_panel=_STEPS)] = 0,
) -> None:
    """Trains SDTP's heads for a model. Stopped, it goes on where it was when called again."""
    from ..evaluation.data.loading import loaded as load
    from ..files import check_folder
    from ..policies import SDTP
    from ..policies.sdtp import Training, read_examples, train, untrained
    from ..policies.sdtp.training import standing

    check_folder(out)
    options = Training(
        marking_epochs=marking_epochs,
        pruning_epochs=pruning_epochs,
        listwise=listwise,
        ranking=ranking,
        mse=mse,
        cross_entropy=cross_entropy,
        distillation=distillation,
        target=target,
        pairs=pairs,
        learning_rate=learning_rate,
        batch=batch,
        evaluate_every=evaluate_every,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    try:
        tokenizer, loaded = load(model, dtype)
        lengths = tokens, completion
        examples = read_examples(data, tokenizer, *lengths, limit=limit, progress=True)
        apart = None
        if held_out is not None:
            apart = read_examples(held_out, tokenizer, *lengths, progress=True)
        heads = untrained(loaded, seed, keep=keep, stages=stages, query_heads=query_heads)
        train(
            loaded,
            examples,
            out,
            options,
            SDTP(heads),
            held_out=apart,
            keep_hidden=keep_hidden,
            note={"model_name": model, "data": data, "held_out_data": held_out},
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; {standing(out)}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out}: pass them as SDTP(SDTPHeads.from_pretrained({str(out)!r}))")


def train_saliency(
    data: Annotated[
        str, typer.Argument(help="JSON lines with prompt and completion, texts, or a data set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the heads and saliency.json.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    limit: Annotated[int, typer.Option(help="The most examples that are read.")] = 1000,
    tokens: Annotated[int, typer.Option(help="The most tokens of an example.")] = 1024,
    completion: Annotated[int, typer.Option(help="Of a text, what is looked back from.")] = 32,
    pruning: Annotated[
        str, typer.Option(help="A pipeline, as sdtp, behind which every second one is read.")
    ] = "dense",
    epochs: Annotated[int, typer.Option(help="How often heads learn from an example.")] = 4,
    held_out: Annotated[int, typer.Option(help="The last examples, to measure with.")] = 24,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Trains heads for Saliency. Stopped, it goes on where it was when called again."""
    from ..evaluation.data.loading import loaded as load
    from ..evaluation.specs import parse
    from ..evaluation.trained import as_page, flops_of_scores, in_words
    from ..files import check_folder, write_text
    from ..policies.saliency import Saliency
    from ..policies.saliency import train_saliency as train
    from ..policies.sdtp import read_examples
    from ..wiring.attach import attach

    check_folder(out)
    policies = parse(pruning)
    path = model_path(model)
    tokenizer, loaded = load(path, dtype)
    # Shorter prompts are kept whole.
    least = max(64, Saliency().protected + 2)
    examples = read_examples(data, tokenizer, tokens, completion, least, limit, progress=True)
    attached = attach(loaded)
    try:
        heads = train(
            attached,
            examples,
            out,
            pruning=policies,
            epochs=epochs,
            held_out=held_out,
            seed=seed,
            report=percent(),
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what is in {out}", err=True)
        raise typer.Exit(130) from None
    account = json.loads((out / "saliency.json").read_text(encoding="utf-8"))
    flops = flops_of_scores(attached, Saliency(heads=heads), examples[-1].prompt)
    typer.echo(in_words(account, flops))
    name = Path(path).name or path
    write_text(out / "saliency.html", as_page(account, flops, name))
    typer.echo(f"{out / 'saliency.html'}: the same, with a plot")
    typer.echo(f"{out}: pass it as Saliency(heads={str(out)!r})")


def measure_heads(
    text: Annotated[str, typer.Argument(help="What to read, or a file that holds it.")],
    out: Annotated[Path, typer.Option(help="File for the scores, as heads.safetensors.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    sinks: Annotated[int, typer.Option(help="First tokens that a streaming head keeps.")] = 64,
    recent: Annotated[int, typer.Option(help="Newest tokens that it keeps.")] = 256,
    tokens: Annotated[int, typer.Option(help="The most tokens of the text.")] = 4096,
) -> None:
    """Measures which heads of a model look far, for DuoAttention."""
    from ..evaluation.compare.progress import stage
    from ..evaluation.data.loading import loaded as load
    from ..files import check_file
    from ..policies.duoattention import head_scores
    from ..wiring.attach import attach

    at_least("measure-heads", 1, tokens=tokens, recent=recent)
    at_least("measure-heads", 0, sinks=sinks)
    read = read_text(text)
    check_file(out)
    path = model_path(model)
    tokenizer, loaded = load(path)
    ids = tokenizer(read, return_tensors="pt").input_ids[:, :tokens].to(loaded.device)
    with stage("reading the text"):
        scores = head_scores(attach(loaded), ids, sinks, recent)
    scores.save(out)
    for layer, row in enumerate(scores.values.tolist()):
        typer.echo(f"layer {layer:3d}  " + "  ".join(f"{score:.3f}" for score in row))
    typer.echo(f"{out}: pass it as DuoAttention({str(out)!r})")


def train_gates(
    text: Annotated[str, typer.Argument(help="What to learn from, or a file that holds it.")],
    out: Annotated[Path, typer.Option(help="Folder for the gates.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    texts: Annotated[int, typer.Option(help="The most pieces of the text that are read.")] = 60,
    tokens: Annotated[int, typer.Option(help="Of each piece.")] = 1000,
    hidden: Annotated[int, typer.Option(help="Of each gate's MLP; 0 for linear gates.")] = 512,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Trains gates for KVzap: each piece of a text is read twice, and they learn the scores."""
    from ..evaluation.compare.progress import stage
    from ..evaluation.data.loading import loaded as load
    from ..files import check_folder
    from ..policies.kvzap import train_gates as train
    from ..wiring.attach import attach

    at_least("train-gates", 1, tokens=tokens)
    at_least("train-gates", 2, texts=texts)
    at_least("train-gates", 0, hidden=hidden)
    read = read_text(text)
    check_folder(out)
    path = model_path(model)
    tokenizer, loaded = load(path)
    ids = tokenizer(read, return_tensors="pt").input_ids.to(loaded.device)
    pieces = [piece for piece in ids.split(tokens, 1) if piece.shape[1] == tokens][:texts]
    if len(pieces) < 2:
        raise KVPruneError(
            f"train-gates: expected a text of at least {2 * tokens} tokens, for two pieces of "
            f"--tokens {tokens}, got {ids.shape[1]}. Give a longer text, or shorter pieces"
        )
    with stage("training gates"):
        found = train(
            attach(loaded), pieces, tokenizer, hidden=hidden or None, seed=seed, report=percent()
        )
    found.gates.save(out)
    each = "  ".join(f"{part:.2f}" for part in found.explained)
    typer.echo(f"explained of KVzip+'s scores (R squared), by layer: {each}")
    typer.echo(f"{out}: pass it as KVzap({str(out)!r})")
