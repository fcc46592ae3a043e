"""Runs the core of the tests on other transformers releases, each in an environment of its own.

    python -m bench.releases oldest newest
    python -m bench.releases all --record

"oldest" and "newest" are the ends of `kvprune.models.releases.TESTED`, "all" is every release in
it. "latest" is the newest release that the package registry has, whether or not anybody has tried
it. `--record` writes the outcomes to bench/results/releases.json, of which
`python -m bench.families` makes a table in docs/families.md.

An environment, build/releases/VERSION, holds one transformers release, and the packages of which
this release asks for other versions; all other packages are those of the environment that runs
this command.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree

from kvprune.models.releases import TESTED

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / "build" / "releases"
RESULTS = ROOT / "bench" / "results" / "releases.json"
CORE = ("releases", "families", "generate", "decoding", "invariants", "saving", "assisted")
"""The test files, test_NAME.py somewhere below tests/, that are run on each release."""


def environment(release: str) -> Path:
    """The Python of an environment with a transformers release; makes one that is not there.

    Args:
        release: a version, or "latest".
    """
    folder = ENVIRONMENTS / release
    python = folder / "bin" / "python"
    # The latest release of today may be newer than that of an earlier run.
    if release != "latest" and (folder / "ready").exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "seen.pth").write_text("\n".join(lines) + "\n")
    # Packages of the running environment count as installed; upgrades go into the new one.
    wanted = "transformers" if release == "latest" else f"transformers=={release}"
    pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade", wanted)
    subprocess.run([python, *pip], check=True)
    (folder / "ready").touch()
    return python


def run_core(python: Path, names: tuple[str, ...], workers: int) -> dict[str, dict[str, int]]:
    """The numbers of tests that passed, failed and were skipped, by test file.

    Args:
        python: the Python of the environment.
        names: the test files, see `CORE`.
        workers: the number of processes.
    """
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    files = [str(p) for name in names for p in (ROOT / "tests").rglob(f"test_{name}.py")]
    options = ("-q", "-n", str(workers), "-p", "no:cacheprovider", f"--junitxml={report}")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, env=env, check=False)
    if not report.exists():
        raise SystemExit(f"{python}: pytest ended without a report")
    found = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        # A file that cannot be collected is a case without a class.
        module = (case.attrib["classname"] or case.attrib["name"]).split(".")
        (name,) = (p.removeprefix("test_") for p in module if p.startswith("test_"))
        kinds = {part.tag for part in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        found[name]["skipped" if "skipped" in kinds else outcome] += 1
    return found


def version_of(python: Path) -> str:
    """The transformers release of an environment."""
    script = "import transformers; print(transformers.__version__)"
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """The table of outcomes on each release, for docs/families.md."""
    lines = [f"| transformers | {' | '.join(CORE)} |", f"| ---: |{' ---: |' * len(CORE)}"]
    for release, found in sorted(results.items(), key=lambda item: _key(item[0])):
        cells = [_cell(found[name]) for name in CORE]
        lines.append(f"| {release} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(counts: dict[str, int]) -> str:
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    return f"{counts['passed']:,}{failed}"


def _key(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def main() -> int:
    """Runs the tests on the releases that were asked for; returns 1 where a test failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "releases", nargs="+", help='versions, "oldest", "newest", "latest" or "all"'
    )
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    meant = {"oldest": (TESTED[0],), "newest": (TESTED[-1],), "all": TESTED}
    asked = [r for name in options.releases for r in meant.get(name, (name,))]
    results, failed = {}, 0
    for asked_release in dict.fromkeys(asked):
        python = environment(asked_release)
        release = version_of(python)
        print(f"== transformers {release}", flush=True)
        results[release] = run_core(python, CORE, options.workers)
        failed += sum(counts["failed"] for counts in results[release].values())
    print("\n" + table(results))
    if options.record:
        # Outcomes of other releases stay, so that a long run can be made in parts.
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(known | results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
