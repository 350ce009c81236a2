"""The GPU run without a GPU: limits, order and what comes back, with commands that do nothing."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import TIMEOUT
from tests.support.pytest_run import run_pytest

ROOT = Path(__file__).parents[2]

NEVER = 3600  # seconds, much longer than a test waits


def parts(out: Path, script: str, deadline: int = NEVER, chosen: str = "") -> str:
    """A run of parts as gpu.sh makes them."""
    return f"""
        OUT={out} DEADLINE={deadline} CHOSEN=({chosen}) GROUP=group SHORTEST=1
        . benchmarks/parts.sh
        begin
        {script}
        conclude
    """


def run(text: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-uo", "pipefail", "-c", text],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def summary(out: Path) -> dict[str, str]:
    """How each part ended, in order."""
    with (out / "summary.csv").open() as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return {line["part"]: line["result"] for line in lines}


def archived(out: Path, name: str) -> str:
    with tarfile.open(out / "gpu.tar.gz") as archive:
        return archive.extractfile(f"./{name}").read().decode()


def test_a_part_ends_at_its_limit_and_the_next_one_runs(tmp_path):
    script = f"part slow 5 bash -c 'echo begun; sleep {NEVER}'; part next {NEVER} echo done"
    assert run(parts(tmp_path, script)).returncode == 1
    assert summary(tmp_path) == {"slow": "timed out", "next": "ok"}
    assert archived(tmp_path, "slow.log") == "begun\n"


def test_no_part_runs_past_the_deadline(tmp_path):
    script = f"part long {NEVER} sleep {NEVER}; part next {NEVER} true"
    assert run(parts(tmp_path, script, deadline=5)).returncode == 1
    assert summary(tmp_path) == {"long": "timed out", "next": "left out"}


def test_a_part_that_fails_does_not_stop_the_next_one(tmp_path):
    script = f"part bad {NEVER} bash -c 'echo why; exit 7'; part next {NEVER} true"
    result = run(parts(tmp_path, script))
    assert result.returncode == 1
    assert summary(tmp_path) == {"bad": "failed (7)", "next": "ok"}
    assert re.search(r"bad,failed \(7\),\d+\n\Z", result.stdout) and "why" in result.stdout


def test_status_is_0_where_all_parts_end_well(tmp_path):
    result = run(parts(tmp_path, f"part first {NEVER} true; part second {NEVER} true"))
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.tar.gz", "summary.csv"]


def test_nothing_runs_after_a_stop(tmp_path):
    script = f"part build {NEVER} false; ok build || stop 'no build'; part next {NEVER} true"
    assert "stopped: no build" in run(parts(tmp_path, script)).stdout
    assert summary(tmp_path) == {"build": "failed (1)", "next": "left out"}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("two", ["two"]), ("t*", ["two", "three"]), ("others", ["three"]), ("", None)],
)
def test_parts_are_chosen_by_name_pattern_or_group_in_their_own_order(tmp_path, chosen, expected):
    script = f"part one {NEVER} true; part two {NEVER} true; GROUP=others; part three {NEVER} true"
    run(parts(tmp_path, script, chosen=f"'{chosen}'" if chosen else ""))
    assert list(summary(tmp_path)) == (expected or ["one", "two", "three"])


def test_the_archive_has_every_part_as_soon_as_it_ends(tmp_path):
    script = f"""
        part first {NEVER} echo one
        part second {NEVER} tar xzfO {tmp_path}/gpu.tar.gz ./first.log
        part third {NEVER} cat {tmp_path}/summary.csv
    """
    run(parts(tmp_path, script))
    assert archived(tmp_path, "second.log") == "one\n"
    ended = [line.split(",")[:2] for line in archived(tmp_path, "third.log").splitlines()[1:]]
    assert ended == [["first", "ok"], ["second", "ok"]]


def test_parts_that_are_started_run_together(tmp_path):
    meet = "touch {0}; until [[ -e {1} ]]; do sleep 0.05; done"
    paths = [tmp_path / "one", tmp_path / "two"]
    script = f"""
        start one {TIMEOUT} bash -c '{meet.format(*paths)}'
        start two {TIMEOUT} bash -c '{meet.format(*reversed(paths))}'
        finish
    """
    assert run(parts(tmp_path / "out", script)).returncode == 0


def test_a_part_may_be_a_function(tmp_path):
    script = f'greet() {{ echo "hello $1"; }}; export -f greet; part greet {NEVER} greet you'
    assert run(parts(tmp_path, script)).returncode == 0
    assert archived(tmp_path, "greet.log") == "hello you\n"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_ends_keeps_its_results(tmp_path, number):
    begun, out = tmp_path / "begun", tmp_path / "out"
    script = f"""
        part first {NEVER} echo one
        part second {NEVER} bash -c 'echo two; echo $$ >{begun}; sleep {NEVER}'
        part third {NEVER} true
    """
    text = parts(out, script)
    # bash cannot trap a signal that it was started to ignore, as background jobs are.
    process = subprocess.Popen(
        ["bash", "-uo", "pipefail", "-c", text],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_until(lambda: begun.exists() and begun.read_text().endswith("\n"))
    running = int(begun.read_text())
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 143
    assert summary(out) == {"first": "ok", "second": "stopped"}
    assert [archived(out, f"{name}.log") for name in ("first", "second")] == ["one\n", "two\n"]
    wait_until(lambda: has_ended(running))


FAKE_PYTHON = """#!{python} -IS
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "get_device_capability" in " ".join(sys.argv):
    print("9.0")
sys.exit(os.environ["FAILS"] in sys.argv)
"""

# What runs another program: that is what it runs.
FAKE_TOOL = """#!/usr/bin/env bash
while (($#)) && [[ $1 != "$PYTHON" ]]; do shift; done
(($#)) || exit 0
exec "$@"
"""

# It may run twice at once: for its version, and to compile.
FAKE_NVCC = """#!/usr/bin/env bash
while (($#)) && [[ $1 != -o ]]; do shift; done
(($#)) || exit 0
echo true >"$2" && chmod +x "$2"
"""


@pytest.fixture
def gpu_run(tmp_path):
    """gpu.sh with names of parts, on a machine of programs that only say how they were called."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    fakes = dict.fromkeys(("ncu", "compute-sanitizer", "nvidia-smi"), FAKE_TOOL)
    fakes["python"] = FAKE_PYTHON.format(python=sys.executable)
    fakes["nvcc"] = FAKE_NVCC
    for name, text in fakes.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*names: str, fails: str = "") -> tuple[subprocess.CompletedProcess, dict, list]:
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "OUT": str(tmp_path / "out"),
            "CALLS": str(calls),
            "FAILS": fails,
            "PDP_COMMIT": "0123abc",
        }
        command = [ROOT / "benchmarks" / "gpu.sh", *names]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
        ended = summary(tmp_path / "out") if (tmp_path / "out").exists() else {}
        return result, ended, list(map(json.loads, lines))

    return run


def test_all_parts_run_in_order_of_importance_with_valid_arguments(gpu_run, tmp_path):
    result, ended, calls = gpu_run()
    assert {name: how for name, how in ended.items() if how != "ok"} == {}
    assert (result.returncode, result.stderr) == (0, "")
    order = list(ended)
    assert set(order[:4]) == {"environment", "build", "workloads", "variants-build"}
    inside = [name for name in order[4:] if "check-" not in name]
    assert inside == [
        *("smoke", "tests", "core", "ncu", "ncu-small"),
        *("sizes", "eager", "host", "2to4", "channel", "pq-index", "sparsity-50", "sparsity-80"),
        *("sparse-linear", "distributed"),
        *("training", "large", "sweep", "variants"),
    ]
    checks = {f"{tool}check-{of}" for tool in ("mem", "race", "init", "sync") for of in KERNELS}
    assert set(order[6:14]) == checks
    text = (tmp_path / "out" / "summary.csv").read_text()
    assert "# commit: 0123abc" in text
    modules = [words[1] for words in calls if words[0] == "-m"]
    assert set(modules) == {"pip", "pytest", *BENCHMARKS}
    for words in calls:
        if words[0] == "-m" and words[1] in BENCHMARKS and words[1] != "benchmarks.report":
            name = words[1] if "." in words[1] else "benchmarks.__main__"
            assert importlib.import_module(name).parse_arguments(words[2:])


KERNELS = ("cuda", "triton")
BENCHMARKS = {
    "benchmarks",
    *(
        f"benchmarks.{name}"
        for name in ("smoke", "profile", "report", "host", "sparse_linear", "distributed")
    ),
    *(f"benchmarks.{name}" for name in ("training_step", "sweep", "variants")),
}


def test_a_call_runs_its_own_parts_after_the_build(gpu_run):
    _, ended, _ = gpu_run("fast", "*-triton")
    assert [name.partition("check-")[2] for name in list(ended)[2:6]] == ["triton"] * 4
    assert list(ended)[6:8] == ["sizes", "eager"]
    assert list(ended)[-1] == "distributed"


def test_a_failed_build_stops_the_run(gpu_run):
    result, ended, calls = gpu_run("right", fails="pip")
    assert result.returncode == 1
    assert "stopped: the build failed" in result.stdout
    assert ended.pop("build") == "failed (1)"
    assert {ended.pop(name) for name in ("environment", "workloads")} <= {"ok", "failed (1)"}
    assert set(ended.values()) == {"left out"} and "smoke" in ended
    assert not [words for words in calls if "benchmarks.smoke" in words]


def test_a_misspelt_part_is_refused_before_anything_runs(gpu_run):
    result, ended, calls = gpu_run("smoke", "bemchmark")
    assert result.returncode == 2
    assert "no part is called bemchmark" in result.stderr
    assert {"ncu", "memcheck-cuda", "sparse-linear"} <= set(result.stderr.split())
    assert (ended, calls) == ({}, [])


def test_pytest_understands_how_the_run_calls_it(gpu_run, tmp_path):
    _, _, calls = gpu_run("tests")
    (words,) = (words[2:] for words in calls if words[1] == "pytest")
    words[words.index("-n") + 1] = "0"  # saves the start of the workers
    tests = "import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
    assert "1 passed" in run_pytest(tmp_path, tests, *words)
