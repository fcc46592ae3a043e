"""What ships: every package, every file once, importable from a wheel and from a checkout."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import kvprune

from .support.fake_tasks import saved_model

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kvprune": "kvprune", "policies": "kvprune/policies"}  # in the repository: as installed
WHERE = "import kvprune, kvprune.policies as p; print(kvprune.__file__, p.__file__, sep='\\n')"


def shipped_files() -> dict[str, str]:
    """Each file that ships: its path in the repository, and as installed."""
    files = {}
    for folder, installed in FOLDERS.items():
        for here, _, names in os.walk(ROOT / folder):  # does not enter kvprune/policies, a link
            inside = Path(here).relative_to(ROOT / folder)
            for name in names:
                if "__pycache__" not in inside.parts:
                    source, target = Path(folder, inside, name), Path(installed, inside, name)
                    files[source.as_posix()] = target.as_posix()
    return files


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    """What the command printed; it sees none of this run's Python settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def the_one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkout/*.whl, sdist/*.tar.gz, and sdist/*.whl, which is built from it."""
    folder = tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    build = (sys.executable, "-m", "build", "--no-isolation", "source", "--outdir")
    run(*build, "checkout", "--wheel", cwd=folder)
    run(*build, "sdist", cwd=folder)
    return folder


def test_pyproject_lists_every_package() -> None:
    files = shipped_files().values()
    on_disk = {str(Path(file).parent).replace("/", ".") for file in files if file.endswith(".py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["checkout", "sdist"])
def test_a_wheel_holds_every_file_once(built: Path, source: str) -> None:
    names = zipfile.ZipFile(the_one(built / source, "*.whl")).namelist()
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in names) == 1
    installed = sorted(name for name in names if ".dist-info/" not in name)
    assert installed == sorted(shipped_files().values())
    assert {"kvprune/py.typed", "kvprune/policies/sdtp/policy.py"} <= set(installed)


@pytest.mark.slow
def test_the_sdist_holds_every_file_once(built: Path) -> None:
    with tarfile.open(the_one(built / "sdist", "*.tar.gz")) as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no link to a second copy
    names = [member.name.partition("/")[2] for member in members]
    assert {"LICENSE", "pyproject.toml"} <= set(names)
    code = sorted(name for name in names if name.startswith(("kvprune/", "policies/")))
    assert code == sorted(shipped_files())


@pytest.mark.slow
def test_an_installed_wheel_imports_from_anywhere(built: Path, tmp_path: Path) -> None:
    wheel, site = the_one(built / "sdist", "*.whl"), tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel,
        cwd=tmp_path)  # fmt: skip
    paths = run(sys.executable, "-c", WHERE, cwd=tmp_path, PYTHONPATH=str(site)).split("\n")
    assert paths[0] == str(site / "kvprune/__init__.py")
    assert paths[1] == str(site / "kvprune/policies/__init__.py")


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_runs_the_quick_start(built: Path, tmp_path: Path) -> None:
    """With what the wheel itself asks for, and nothing else of ours."""
    python = tmp_path / "empty/bin/python"
    run(sys.executable, "-m", "venv", python.parent.parent, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt",
        the_one(built / "checkout", "*.whl"), cwd=tmp_path)  # fmt: skip
    page = (ROOT / "docs/quick-start.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    given = f"name, long_text = {str(saved_model(tmp_path / 'model'))!r}, {'abc <[d' * 40!r}\n"
    (tmp_path / "first.py").write_text(given + first + second)
    said = run(python, "first.py", cwd=tmp_path)
    assert said.startswith("ComposedCache([H2O(heavy=64, recent=64")
    told = run(tmp_path / "empty/bin/kvprune", "doctor", cwd=tmp_path)
    assert re.search(r"seams +(\d+) of \1 found", told)


@pytest.mark.slow
def test_the_index_would_take_what_is_built(built: Path) -> None:
    """As the tools say that look at packages before they are uploaded."""
    for source in ("checkout", "sdist"):
        files = sorted((built / source).iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)
        run(sys.executable, "-m", "check_wheel_contents", the_one(built / source, "*.whl"),
            cwd=built)  # fmt: skip


def test_changes_make_a_section(tmp_path: Path) -> None:
    """Each file of `changes/` is of a kind that there is, and stands in the next release."""
    draft = run(sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9", cwd=ROOT)
    assert draft.index("## 9.9 (") < draft.index("### Added")
    for file in (ROOT / "changes").glob("*.md"):
        said = "".join(file.read_text().split())
        assert said in "".join(draft.split()), file


def test_the_version_is_the_package_s() -> None:
    """The name that people look for."""
    assert kvprune.__version__ == importlib.metadata.version("kvprune")


def test_the_command_is_a_module_too(tmp_path: Path) -> None:
    """`python -m kvprune` is `kvprune`."""
    said = run(sys.executable, "-m", "kvprune", "--help", cwd=tmp_path)
    assert all(name in said for name in ("demo", "doctor", "compare", "train-saliency"))


PLACES = re.compile(r"(?<![\w.~])/(home|root|Users|work|tmp|mnt|var/folders)/[\w.-]+")


def test_no_file_names_a_place_on_some_machine() -> None:
    """What was measured or made here tells nothing of the folders that it was in."""
    found = []
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split("\n")
    assert len(listed) > 400
    for name in listed:
        path = ROOT / name
        looked_at = path.suffix in TEXTS or path.name in {"Makefile", "run"}
        if looked_at and path.is_file() and path.resolve() not in MADE_UP:
            text = path.read_text(encoding="utf-8")
            found += [f"{path}: {place[0]}" for place in PLACES.finditer(text)]
    assert not found


MADE_UP = {Path(__file__).resolve(), ROOT / "tests" / "evaluation" / "test_command.py"}
"""Tests of the places themselves."""
TEXTS = {".py", ".md", ".json", ".jsonl", ".html", ".svg", ".yml", ".toml", ".txt", ".cff"}


def test_an_editable_install_imports_from_anywhere(tmp_path: Path) -> None:
    paths = run(sys.executable, "-c", WHERE, cwd=tmp_path).split("\n")
    assert Path(paths[0]).resolve() == ROOT / "kvprune/__init__.py"
    assert Path(paths[1]).resolve() == ROOT / "policies/__init__.py"
