"""The pictures of the docs: what they show is what a cache held, and they are up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kvprune
from bench import policy_pictures as pictures
from kvprune.policies import H2O, StreamingLLM

from ..support.models import LAYERS, prompt, tiny_model

SAID = json.loads((pictures.FOLDER / "pictures.json").read_text())


def test_a_picture_is_of_what_the_cache_holds():
    """By layer and column, how many heads; prompt and generated tokens, but the last."""
    model: Any = tiny_model()
    rows = pictures.kept(model, prompt(1, 40), (StreamingLLM(sinks=2, window=5),))
    assert rows == ["22" + "0" * 48 + "2" * 5] * LAYERS
    rows = pictures.kept(model, prompt(1, 40), (H2O(heavy=4, recent=4),))
    cache = kvprune.ComposedCache([H2O(heavy=4, recent=4)])
    model.generate(prompt(1, 40), cache=cache, max_new_tokens=16, do_sample=False)
    for layer, row in enumerate(rows):
        columns = cache.columns(layer)[0].flatten().tolist()
        assert list(map(int, row)) == [columns.count(c) for c in range(55)]


def test_every_picture_is_drawn_from_what_was_found(tmp_path: Path):
    """The committed files are those that the committed numbers give."""
    (tmp_path / "pictures.json").write_text(json.dumps(SAID))
    pictures.draw(tmp_path)
    drawn = {p.name: p.read_text() for p in tmp_path.glob("*.svg")}
    assert drawn == {p.name: p.read_text() for p in pictures.FOLDER.glob("*.svg")}
    assert {f"{name}.svg" for name in pictures.POLICIES} == set(drawn)
    said = {name: picture["policies"] for name, picture in SAID["pictures"].items()}
    assert said == {name: pictures.named(name) for name in pictures.POLICIES}


def test_a_drawing_has_a_rectangle_for_each_run():
    """All of two heads in the first columns, one of them in the last."""
    picture = {"policies": "a | <b>", "kept": ["2201", "0000"]}
    drawn = pictures.drawn(picture, prompt=3, heads=2)
    cells = dict(re.findall(r'<path class="(few|all)" d="(.*?)"', drawn))
    assert cells == {"all": "M56.0 24.0h9.2v5h-9.2z", "few": "M69.8 24.0h4.6v5h-4.6z"}
    assert "a | &lt;b&gt;: 31% of all slots kept" in drawn


def test_every_picture_stands_on_a_page():
    """On one of a policy, and in the gallery."""
    text = "".join(page.read_text() for page in pictures.FOLDER.glob("*.md"))
    assert set(re.findall(r"\]\(([\w-]+\.svg)\)", text)) == {f"{n}.svg" for n in pictures.POLICIES}
    gallery = (pictures.FOLDER.parent / "gallery.md").read_text()
    shown = re.findall(r"\]\(policies/([\w-]+)\.svg\)", gallery)
    assert sorted(shown) == sorted(pictures.POLICIES)


@pytest.mark.slow
def test_the_demo_model_keeps_what_the_pictures_show():
    """But for near ties, which another processor's rounding may turn."""
    threads = torch.get_num_threads()
    try:
        now = pictures.demo()
    finally:
        torch.set_num_threads(threads)
    assert now["prompt"] == SAID["prompt"] and now["heads"] == SAID["heads"]
    for name, picture in now["pictures"].items():
        mine, said = "".join(picture["kept"]), "".join(SAID["pictures"][name]["kept"])
        assert len(mine) == len(said)
        assert sum(a != b for a, b in zip(mine, said, strict=True)) <= len(said) // 100, name
