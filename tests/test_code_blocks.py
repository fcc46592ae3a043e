"""Every code block of README and docs runs, and a broken one does not go unseen."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from .support.code_blocks import PAGES, ROOT, Block, BrokenBlock, blocks_of, check_command, run_page
from .support.strategies import sdtp_heads

TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
EXCUSED = [b for page in PAGES for b in blocks_of(page, TEXTS[page]) if "not run" in b.orders]
INLINE = re.compile(r"(?<!`)`((?:make|kvprune|pip|python -m) [^`\n]+)`(?!`)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty; `SDTP()` finds heads for the tiny model, for which none ship."""

    def heads_for(model: Any) -> Any:
        return sdtp_heads().to(next(model.parameters()).dtype)

    # The package's attribute of that name is the class SDTP's module no longer.
    monkeypatch.setattr(sys.modules["kvprune.policies.sdtp.policy"], "heads_for", heads_for)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page: str, folder: Path) -> None:
    run_page(page, TEXTS[page], folder)


@pytest.mark.parametrize("block", EXCUSED, ids=[b.where for b in EXCUSED])
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    """`pytest -rs` lists them."""
    pytest.skip(f"{block.where} is not run: {block.orders['not run']}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_the_text_names_exist(page: str) -> None:
    for command in INLINE.findall(TEXTS[page]):
        check_command(shlex.split(command), whole=False)


BROKEN = {
    "raises": ("```python\nx = 1\nx.y\n```", ":2: AttributeError"),
    "syntax": ("```python\nx = = 1\n```", ":2: SyntaxError"),
    "asserts": ("```python\nassert 1 > 2\n```", ":2: AssertionError"),
    "forgets": ("```python\nmodel\n```", ":2: NameError"),
    "second block": ("```python\nx = 1\n```\n\n```python\nx + y\n```", ":6: NameError"),
    "indented": ("* so:\n\n  ```python\n  z\n  ```", ":4: NameError"),
    "given": ("<!-- given: modle -->", "modle"),
    "language": ("```\nmake demo\n```", "expected a block of"),
    "no reason": ("<!-- not run: -->\n```python\nx\n```", ":3: BrokenBlock: not run: expected"),
    "toml": ("```toml\n[a\n```", ":2: TOMLDecodeError"),
    "json": ("```json\n{'a': 1}\n```", ":2: JSONDecodeError"),
    "command": ("```bash\nkvprnue demo\n```", "kvprnue"),
    "subcommand": ("```bash\nkvprune dmeo\n```", "dmeo"),
    "option": ("```bash\nkvprune explain text --htlm page\n```", "htlm"),
    "left out": ("```bash\nkvprune train-sdtp --model name --out heads\n```", "data"),
    "value": ("```bash\nkvprune train-sdtp --batch two\n```", "--batch"),
    "target": ("```bash\nmake dome\n```", "dome"),
    "extra": ("```bash\npip install .[trian]\n```", "trian"),
    "file": ("```bash\npip install -c constrains.txt .\n```", "constrains.txt"),
    "module": ("```bash\npython -m bench.sped\n```", "bench.sped"),
    "module's option": ("```bash\npython -m bench.speed --contxt 5\n```", "--contxt"),
    "run": ("<!-- run -->\n```bash\nfalse\n```", "exit status 1"),
    "diff": ("<!-- file: policies/h2o.py -->\n```diff\n gone\n+here\n```", "0 times"),
    "overwrites": ("<!-- file: policies/h2o.py -->\n```python\nx = 1\n```", "there already"),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_block_fails(text: str, said: str, folder: Path) -> None:
    with pytest.raises(BrokenBlock, match=re.escape(said)):
        run_page("page.md", text, folder)


def test_a_block_that_is_right_passes(folder: Path) -> None:
    """One of each kind; what one Python block made, the next one has."""
    text = """
<!-- given: name, long_text -->
```python
from dataclasses import dataclass
@dataclass
class A:
    words: int
a = A(len(long_text.split()))
```
<!-- not run: there is no such thing -->
```python
no.such.thing
```
```bash
kvprune explain "some text" --html page.html  # a page
python -m bench.speed --contexts 4096 \\
    --repeats 3
make test PYTHON=python3.12
```
<!-- file: tests/here.txt -->
```text
one
```
<!-- file: tests/here.txt -->
```diff
-one
+two
```
<!-- run -->
```bash
grep two tests/here.txt && test -f kvprune/policies/h2o.py
```
```python
assert a.words == 150
```
"""
    text = text.replace("one\n```\n<", "zero\none\n```\n<", 1)
    run_page("page.md", text, folder)


@pytest.mark.parametrize("command", ["make dome", "kvprune dmeo", "python -m bench.sped"])
def test_a_command_in_the_text_that_does_not_exist_is_seen(command: str) -> None:
    (found,) = INLINE.findall(f"Then `{command}` does it.")
    with pytest.raises(BrokenBlock):
        check_command(shlex.split(found), whole=False)
