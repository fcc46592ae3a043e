"""The command `kvprune`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .errors import KVPruneError

_TASKS = ["needle", "squad"]
_CONTEXTS = [1024]
_BUDGETS = list[float]()
_STORES = list[str]()
_ASK = list[str]()
_DATA, _HEADS, _LOSSES, _STEPS = "Data", "Heads", "Losses", "Steps"
"""The parts of a long list of options."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Token pruning and KV-cache eviction as composable policies inside generate.",
)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    text: Annotated[
        str | None, typer.Option(help="A document, or a file that holds it; an article.")
    ] = None,
    ask: Annotated[list[str], typer.Option(help="A question about it; may be repeated.")] = _ASK,
    html: Annotated[Path | None, typer.Option(help="Write what is kept as a page.")] = None,
) -> None:
    """One long document and questions about it, with several configurations: one table."""
    from .evaluation.demo import run_demo

    run_demo(model=model, text=None if text is None else _text(text), ask=ask, html=html)


@app.command("train-sdtp")
def train_sdtp(
    model: Annotated[str, typer.Option(help="Name or path of the model.", rich_help_panel=_DATA)],
    data: Annotated[
        str, typer.Option(help="Texts, JSON lines, a folder, a data set.", rich_help_panel=_DATA)
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is made.", rich_help_panel=_DATA)],
    tokens: Annotated[int, typer.Option(help="Most of an example.", rich_help_panel=_DATA)] = 1024,
    completion: Annotated[
        int, typer.Option(help="Of a text's tokens, to be likely.", rich_help_panel=_DATA)
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
        int | None, typer.Option(help="To rank per stage; all.", rich_help_panel=_LOSSES)
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
        int | None, typer.Option(help="Steps; each epoch's end.", rich_help_panel=_STEPS)
    ] = None,
    keep_hidden: Annotated[
        bool,
        typer.Option("--keep-hidden", help="One forward, on disk.", rich_help_panel=_STEPS),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", rich_help_panel=_STEPS)] = 0,
) -> None:
    """Trains SDTP's heads for a model. Stopped, it goes on where it was when called again."""
    from .evaluation.data.loading import loaded as load
    from .files import check_folder
    from .policies import SDTP
    from .policies.sdtp import Training, read_examples, train, untrained
    from .policies.sdtp.training import standing

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


@app.command("train-saliency")
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
    from .evaluation.data.assets import demo_model
    from .evaluation.data.loading import loaded as load
    from .evaluation.specs import parse
    from .evaluation.trained import as_page, flops_of_scores, in_words
    from .files import check_folder, write_text
    from .policies.saliency import Saliency
    from .policies.saliency import train_saliency as train
    from .policies.sdtp import read_examples
    from .wiring.attach import attach

    check_folder(out)
    policies = parse(pruning)
    path = (
        str(demo_model(report=lambda line: typer.echo(line, err=True))) if model is None else model
    )
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
            report=_percent(),
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


@app.command("measure-heads")
def measure_heads(
    text: Annotated[str, typer.Argument(help="What to read, or a file that holds it.")],
    out: Annotated[Path, typer.Option(help="File for the scores, as heads.safetensors.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    sinks: Annotated[int, typer.Option(help="First tokens that a streaming head keeps.")] = 64,
    recent: Annotated[int, typer.Option(help="Newest tokens that it keeps.")] = 256,
    tokens: Annotated[int, typer.Option(help="The most tokens of the text.")] = 4096,
) -> None:
    """Measures which heads of a model look far, for DuoAttention."""
    from .evaluation.compare.progress import stage
    from .evaluation.data.assets import demo_model
    from .evaluation.data.loading import loaded as load
    from .files import check_file
    from .policies.duoattention import head_scores
    from .wiring.attach import attach

    read = _text(text)
    check_file(out)
    path = (
        str(demo_model(report=lambda line: typer.echo(line, err=True))) if model is None else model
    )
    tokenizer, loaded = load(path)
    ids = tokenizer(read, return_tensors="pt").input_ids[:, :tokens].to(loaded.device)
    with stage("reading the text"):
        scores = head_scores(attach(loaded), ids, sinks, recent)
    scores.save(out)
    for layer, row in enumerate(scores.values.tolist()):
        typer.echo(f"layer {layer:3d}  " + "  ".join(f"{score:.3f}" for score in row))
    typer.echo(f"{out}: pass it as DuoAttention({str(out)!r})")


@app.command("train-gates")
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
    from .evaluation.compare.progress import stage
    from .evaluation.data.assets import demo_model
    from .evaluation.data.loading import loaded as load
    from .files import check_folder
    from .policies.kvzap import train_gates as train
    from .wiring.attach import attach

    read = _text(text)
    check_folder(out)
    path = (
        str(demo_model(report=lambda line: typer.echo(line, err=True))) if model is None else model
    )
    tokenizer, loaded = load(path)
    ids = tokenizer(read, return_tensors="pt").input_ids.to(loaded.device)
    pieces = [piece for piece in ids.split(tokens, 1) if piece.shape[1] == tokens][:texts]
    with stage("training gates"):
        found = train(
            attach(loaded), pieces, tokenizer, hidden=hidden or None, seed=seed, report=_percent()
        )
    found.gates.save(out)
    each = "  ".join(f"{part:.2f}" for part in found.explained)
    typer.echo(f"explained of KVzip+'s scores (R squared), by layer: {each}")
    typer.echo(f"{out}: pass it as KVzap({str(out)!r})")


def _percent() -> Callable[[str, float], None]:
    """What says how much of a stage is done, each percent once."""
    said = ""

    def tell(what: str, done: float) -> None:
        nonlocal said
        if (now := f"{what}: {done:.0%}") != said:
            typer.echo(now, err=True)
        said = now

    return tell


@app.command("explain")
def explain_text(
    text: Annotated[str, typer.Argument(help="What to read, or a file that holds it.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    policies: Annotated[
        str, typer.Option(help="A pipeline, as sdtp+saliency(0.25) or sdtp(heads='folder').")
    ] = "sdtp",
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Shows which tokens of a text policies keep, and in how many layers."""
    from rich.console import Console

    from .evaluation.compare.progress import stage
    from .evaluation.data.assets import demo_model
    from .evaluation.data.loading import loaded as load
    from .evaluation.explain import as_page, as_terminal, explain
    from .evaluation.specs import parse
    from .files import check_file, write_text
    from .wiring.attach import attach

    read = _text(text)
    if html is not None:
        check_file(html)
    pipeline = parse(policies)
    path = (
        str(demo_model(report=lambda line: typer.echo(line, err=True))) if model is None else model
    )
    tokenizer, loaded = load(path)
    with stage("reading the text"):
        explained = explain(attach(loaded), tokenizer, read, pipeline)
    Console().print(as_terminal(explained))
    if html is not None:
        write_text(html, as_page(explained))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Name or path of a model to try.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16.")] = "auto",
) -> None:
    """Says what is installed, and what works with a model: what to send with a question.

    Ends with 1 if this transformers release lacks what kvprune needs, or a model is refused.
    """
    from .evaluation.doctor import examined

    well = True
    for line in examined(model, dtype):
        typer.echo(f"{line.name:20} {line.found}")
        well = well and line.well
    if not well:
        raise typer.Exit(1)


def _text(given: str) -> str:
    """A text that a command reads: the argument itself, or the contents of the file that it names.

    Raises:
        KVPruneError: an empty text, a file that is not UTF-8, or a name that only a file can have
            while there is no such file.
    """
    # An empty path would mean the current folder.
    if not given:
        raise KVPruneError("expected a text of at least one token, got an empty one")
    try:
        path = Path(given)
        if path.is_file():
            return path.read_text(encoding="utf-8")
        missing = path.suffix in (".txt", ".md") and not any(c.isspace() for c in given)
        given.encode()
    except UnicodeError as error:
        raise KVPruneError(f"expected a text in UTF-8, got {error}") from error
    except (OSError, ValueError):
        # The text cannot be the name of a file, for example because it is too long.
        return given
    if missing or path.is_dir():
        raise KVPruneError(f"{given}: expected a text or a file, and there is no such file")
    return given


class _Several(TyperCommand):
    """A command whose repeatable options also take several values: `--tasks a b`.

    The command must have no arguments of its own. Then everything between a value and the next
    option can only be one more value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Writes the option's name before each further value, then parses as usual."""
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        names = {name for p in self.params for name in p.opts}
        return super().parse_args(ctx, _repeated(args, several, names))


def _repeated(args: list[str], several: Collection[str], names: Collection[str]) -> list[str]:
    """The arguments, with `--tasks a b` written as `--tasks a --tasks b`.

    Args:
        args: the arguments as the user gave them.
        several: the names of the options that take several values.
        names: the names of all options.

    Raises:
        KVPruneError: an option is followed by another option and not by a value.
    """
    spelled, option, has_value = list[str](), None, False
    for arg in args:
        name, equals, _ = arg.partition("=")
        # Otherwise the next option's name would be taken for the value.
        if option and not has_value and name in names:
            raise KVPruneError(f"{option}: expected at least one value, got {name} right behind it")
        if arg.startswith("-"):
            option, has_value = name if name in several else None, bool(equals)
        else:
            spelled += [option] if option and has_value else []
            has_value = True
        spelled.append(arg)
    return spelled


@app.command("compare", cls=_Several)
def compare_policies(
    policies: Annotated[
        list[str], typer.Option(help="Specs, as dense, h2o(heavy=256,recent=256), sdtp+h2o, a|b.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and report.html.")],
    model: Annotated[str | None, typer.Option(help="Name or path; the demo model.")] = None,
    tasks: Annotated[list[str], typer.Option(help="Names, or paths of JSON lines.")] = _TASKS,
    context: Annotated[list[int], typer.Option(help="The most tokens of a prompt.")] = _CONTEXTS,
    budgets: Annotated[
        list[float], typer.Option(help="Shares of the prompt; the policies' own budgets.")
    ] = _BUDGETS,
    samples: Annotated[int, typer.Option(help="Of each cell.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    question: Annotated[
        str, typer.Option(help="Before the context is compressed: known, unknown, both.")
    ] = "known",
    stores: Annotated[
        list[str], typer.Option(help="How slots are held: plain, quantized, quantized(bits=8).")
    ] = _STORES,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    executor: Annotated[
        str, typer.Option(help="local, shared (prompts read once), ray.")
    ] = "local",
) -> None:
    """Compares policies: quality and cost on each task, at each context length and budget.

    Stopped, it goes on where it was when called again; more of everything may then be asked for.
    Ends with 1 if a cell failed (the others are run), with 2 if something was asked for that
    cannot be, and with 130 if it was stopped.
    """
    from .evaluation.compare.compare import Run, measured
    from .evaluation.compare.plan import Plan
    from .evaluation.compare.progress import described, stage
    from .evaluation.data.assets import demo_model
    from .evaluation.report import write_report
    from .evaluation.report.console import show

    _see_current_folder()
    plan = Plan(policies, tasks, context, budgets, samples, seed, question, stores)
    path = model
    if path is None:
        path = str(demo_model(report=lambda line: typer.echo(line, err=True)))
    run = Run(path, dtype=dtype, device=device, executor=executor)
    try:
        found = measured(plan, run, out, progress=True)
        # The table is shown first, so that it is there even if the report fails.
        show(found.rows)
        with stage("writing the report"):
            write_report(found.results, out)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what is in {out}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out / 'report.html'}, {out / 'results.jsonl'}")
    for failure in found.failures:
        typer.echo(f"failed: {described(failure.cell)}: {failure.error}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _see_current_folder() -> None:
    """Lets a policy `module:Class` be found in the current folder, where commands do not look."""
    here = os.getcwd()
    if here not in sys.path:
        # The folder goes last, so that no file in it hides a package.
        sys.path.append(here)


def main() -> None:
    """Runs the command; an expected error is printed as one line, without a traceback."""
    try:
        app()
    except KVPruneError as error:
        typer.echo(f"kvprune: {error}", err=True)
        raise SystemExit(2) from None
