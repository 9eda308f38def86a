"""Tests and measures pykvc on the CUDA device of this machine, and prints a report in Markdown.

    python evals/tools/gpu_report.py [--model MODEL.gguf] [--out report.md]     # builds first
    python evals/tools/gpu_report.py --kit gpu-kit --model MODEL.gguf --minutes 10      # `make gpu-kit` elsewhere
    python evals/tools/gpu_report.py --cpu     # the same steps without CUDA and on less, to try the script

Wants nvidia-smi and Python 3.10+, and without --kit CUDA's nvcc, a C++ compiler and a network; everything else goes
into a folder of its own (.build/gpu). First the bench, then one RULER task, then the tests, most telling first, until
the minutes are over. Each test file is a process, so a device that aborts in one of them does not hide the others. The
exit status is 0 if all of it went well, 1 if a test, the bench or RULER failed or the build does not see the device, 2
if something is missing.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
# 3.24: CUDA architecture "native"
TOOLS = ["pip>=23.1", "scikit-build-core>=0.11", "pybind11>=2.12", "cmake>=3.24", "ninja"]
CPU_TESTS = ["test_package.py", "test_engine.py", "test_device.py"]
FIRST_TESTS = ["test_engine.py", "test_exactness.py", "test_signals.py", "test_scores.py", "test_share.py",
               "test_cells.py", "test_batch.py", "test_families.py"]  # of a GPU
RULER = ["--task", "ruler", "--sets", "niah_multikey_2", "--length", "4096", "--n", "10", "--policy",
         "full,keydiff,snapkv", "--budget", "25%", "-ngl", "99"]
CPU_RULER = ["--task", "ruler", "--sets", "niah_multikey_2", "--length", "1024", "--n", "1", "--policy", "full,keydiff",
             "--budget", "25%"]
BENCH = ["-r", "3", "-n", "64", "-p", "4096,16384", "--kv-policy", "snapkv,keydiff,streaming_llm", "--kv-budget",
         "512,2048"]
CPU_BENCH = ["-r", "1", "-n", "8", "-p", "256,512", "--kv-policy", "snapkv,keydiff", "--kv-budget", "64"]


class Stop(Exception):
    """A sentence for the user: the report cannot be made."""


@dataclass
class Tests:
    file: str
    end: str = "ran"  # or how the process died
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0

    @property
    def good(self) -> bool:
        if self.end == "not finished in time":
            return True
        bad = self.counts.get("failed", 0) + self.counts.get("errors", 0)
        return self.end == "ran" and self.counts["passed"] > 0 and not bad


def main() -> int:
    args = arguments()
    clock = Clock(args.minutes)
    try:
        facts = {"machine": f"{platform.platform()}, {os.cpu_count()} CPUs", "commit": versions()}
        if not args.cpu:
            facts |= cuda(builds=not args.kit)
        folder = args.folder.resolve()
        python, stock = unpack(folder, args.kit.resolve()) if args.kit else build(folder, args.cpu)
        devices = json.loads(run([python, "-c",
                                  "import json; from pykvc import _core; print(json.dumps(_core.devices()))"],
                                  cwd=folder))
        facts["devices of the build"] = "; ".join(f"{name} ({what})" for name, what, _ in devices)
        if not args.cpu and "GPU" not in [kind for *_, kind in devices]:
            raise Stop(f"the build sees no GPU, only {facts['devices of the build']}: the driver may be older than the "
                       "CUDA toolkit")
    except Stop as why:
        print(f"gpu_report: {why}", file=sys.stderr)
        return 2
    model = ["-m", args.model] if args.model else []
    bench, bench_ok = run_bench(folder, python, args.cpu, model, clock)
    ruler, ruler_ok = run_ruler(folder, python, args.cpu, model, clock)
    files = test_files(args.cpu)
    tests = []
    for name in files:
        if clock.left() == 0:
            break
        tests.append(run_tests(folder, python, stock, name, args.cpu, clock))
    report = markdown(args.cpu, facts, tests, files[len(tests):], bench, ruler)
    if args.out:
        args.out.write_text(report)
    print(report)
    return 0 if bench_ok and ruler_ok and all(t.good for t in tests) else 1


class Clock:
    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60*minutes if minutes else None

    def left(self) -> float | None:
        """Seconds; None: no limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true",
                        help="without CUDA, a few tests and a short bench: tries this script, not a device")
    parser.add_argument("--model",
                        help="for the bench, as pykvc's -m (default: SmolLM2-135M, which is small for a GPU)")
    parser.add_argument("--kit", type=Path, help="folder that `make gpu-kit` made: nothing is fetched or compiled")
    parser.add_argument("--minutes", type=float, default=0,
                        help="what has not ended by then is stopped, and tests are left out; 0: no limit")
    parser.add_argument("--folder", type=Path, default=REPO/".build/gpu",
                        help="for the build, its logs and the environment")
    parser.add_argument("--out", type=Path, help="writes the report to a file, too")
    args = parser.parse_args()
    if args.kit and not args.model:
        parser.error("a kit has no model: give --model FILE.gguf, too")
    return args


# -- what there is --------------------------------------------------------------------------------------------------

def versions() -> str:
    done = subprocess.run(["git", "-C", REPO, "describe", "--always", "--dirty", "--abbrev=12"], text=True,
                          capture_output=True)
    pin = json.loads((REPO/"third_party/llama_cpp.json").read_text())["commit"]
    return f"{done.stdout.strip() or 'unknown (no git)'}, llama.cpp {pin[:12]}"


def cuda(builds: bool) -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        raise Stop("no nvidia-smi in PATH: this machine has no NVIDIA driver (--cpu tries the steps without one)")
    query = ["name", "memory.total", "compute_cap", "driver_version"]
    lines = run(["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]).strip().splitlines()
    if not lines:
        raise Stop("nvidia-smi lists no GPU")
    facts = {"GPU (memory, compute capability, driver)": "; ".join(lines)}
    if not builds:
        return facts
    if not shutil.which("nvcc"):
        raise Stop("no nvcc in PATH: install the CUDA toolkit, of a version that the driver supports (nvidia-smi shows "
                   "it), or add its bin folder to PATH")
    release = re.search(r"release ([\d.]+)", run(["nvcc", "--version"]))
    return {**facts, "CUDA toolkit": release[1] if release else "unknown"}


# -- build ----------------------------------------------------------------------------------------------------------

def unpack(folder: Path, kit: Path) -> tuple[Path, Path]:
    """As build(), of a folder with wheels/*.whl, pykvc's and all that it takes, and stock/stock."""
    for part in ("wheels", "stock/stock"):
        if not (kit/part).exists():
            raise Stop(f"{kit} is no kit, there is no {part}: `make gpu-kit CUDA_ARCHS=90-real` makes one")
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--clear", folder/"venv"])
    python = folder/"venv/bin/python"
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index",
         *(kit/"wheels").glob("*.whl")])
    return python, kit/"stock/stock"


def build(folder: Path, cpu: bool) -> tuple[Path, Path]:
    """The Python of an environment that has pykvc, and the reference of the exactness tests."""
    python = folder/"venv/bin/python"
    defines = ["PYKVC_PORTABLE=OFF"] + ([] if cpu else ["GGML_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native"])
    folder.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        run([sys.executable, "-m", "venv", folder/"venv"])
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, *TOOLS])
    environment = {**os.environ, "PATH": f"{folder/'venv/bin'}{os.pathsep}{os.environ['PATH']}"}
    step("building (CUDA takes its time)" if not cpu else "building", folder/"build.log",
         [*pip, "--no-build-isolation", "-C", f"build-dir={folder/'pykvc'}",
          *[x for d in defines for x in ("-C", f"cmake.define.{d}")], f"{REPO}[test,evals]"],
         environment)
    if not cpu:
        step("building the reference", folder/"stock.log",
             ["cmake", "-S", REPO/"tests/stock", "-B", folder/"stock", "-G", "Ninja",
             f"-DPython_EXECUTABLE={python}", *[f"-D{d}" for d in defines]], environment)
        step("building the reference", folder/"stock.log", ["cmake", "--build", folder/"stock"], environment)
    return python, folder/"stock/stock"


def step(what: str, log: Path, command: list, environment: dict) -> None:
    print(f"{what}: {log}", file=sys.stderr)
    with open(log, "w") as out:
        if subprocess.run([str(x) for x in command], env=environment, cwd=log.parent, stdout=out,
                          stderr=subprocess.STDOUT).returncode:
            raise Stop(f"{what} failed; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def run(command: list, cwd: Path | None = None) -> str:
    done = subprocess.run([str(x) for x in command], text=True, capture_output=True, cwd=cwd)
    if done.returncode:
        raise Stop(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


# -- measure --------------------------------------------------------------------------------------------------------

def test_files(cpu: bool) -> list[str]:
    """Most telling first."""
    found = sorted(path.name for path in (REPO/"tests").glob("test_*.py"))
    return CPU_TESTS if cpu else [*FIRST_TESTS, *(name for name in found if name not in FIRST_TESTS)]


def run_tests(folder: Path, python: Path, stock: Path, name: str, cpu: bool, clock: Clock) -> Tests:
    print(f"testing: {name}", file=sys.stderr)
    xml, log = folder/f"{name}.xml", folder/f"{name}.log"
    xml.unlink(missing_ok=True)
    environment = {**os.environ, "PYKVC_TEST_NGL": "0" if cpu else "99", "PYKVC_STOCK": str(stock)}
    tests = Tests(name)
    with open(log, "w") as out:
        try:
            code = subprocess.run([python.with_name("pytest"), "-q", REPO/"tests"/name, f"--junitxml={xml}"],
                                  env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT,
                                  timeout=clock.left()).returncode
        except subprocess.TimeoutExpired:
            tests.end = "not finished in time"
            return tests
    if not xml.exists():
        tests.end = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        tests.failures = log.read_text(errors="replace").splitlines()[-3:]
        return tests
    suite = next(ElementTree.parse(xml).iter("testsuite"))
    n = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    tests.counts = {"passed": n["tests"] - n["failures"] - n["errors"] - n["skipped"], "failed": n["failures"],
                    "errors": n["errors"], "skipped": n["skipped"]}
    tests.seconds = float(suite.get("time"))
    for case in suite.iter("testcase"):
        for bad in [*case.iter("failure"), *case.iter("error")]:
            tests.failures.append(f"{case.get('name')}: {(bad.get('message') or 'no message').splitlines()[0][:200]}")
    return tests


def run_bench(folder: Path, python: Path, cpu: bool, model: list[str], clock: Clock) -> tuple[str, bool]:
    command = [python.with_name("pykvc"), "bench", *(CPU_BENCH if cpu else BENCH), "-ngl", "0" if cpu else "99", "-o",
               "md"]
    return measured("measuring", [*command, *model], folder, clock)


def run_ruler(folder: Path, python: Path, cpu: bool, model: list[str], clock: Clock) -> tuple[str, bool]:
    command = [python, "-m", "evals", "run", *(CPU_RULER if cpu else RULER), "--out", folder/"ruler"]
    shutil.rmtree(folder/"ruler", ignore_errors=True)
    text, good = measured("asking", [*command, *model], REPO, clock)
    if not good:
        return text, False
    table, good = measured("asking", [python, "-m", "evals", "report", "--out", folder/"ruler"], REPO, clock)
    return f"{text.split(chr(10))[0]}\n\n{table.partition(chr(10)*2)[2]}", good


def measured(what: str, command: list, folder: Path, clock: Clock) -> tuple[str, bool]:
    """The command and what it printed, or how it failed."""
    print(what, file=sys.stderr)
    words = [str(x) for x in command]
    shown = f"`{' '.join([Path(words[0]).name, *words[1:]])}`"
    try:
        done = subprocess.run(words, text=True, capture_output=True, cwd=folder, timeout=clock.left())
    except subprocess.TimeoutExpired:
        return f"{shown} was not finished in time", False
    if done.returncode:
        return f"{shown} ended with status {done.returncode}: {done.stderr.strip()[-500:]}", False
    return f"{shown}\n\n{done.stdout.strip()}", True


# -- report ---------------------------------------------------------------------------------------------------------

def markdown(cpu: bool, facts: dict[str, str], tests: list[Tests], left_out: list[str], bench: str,
             ruler: str) -> str:
    lines = ["# pykvc on the CPU, a trial of this script" if cpu else "# pykvc on CUDA", "",
             f"{datetime.date.today()}, Python {platform.python_version()}", ""]
    if cpu:
        lines += ["**No GPU was used: this says nothing about one.**", ""]
    lines += ["| | |", "| --- | --- |"] + [f"| {key} | {value} |" for key, value in facts.items()]
    lines += ["", "## Tests", "", "| file | passed | failed | errors | skipped | s | |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for t in tests:
        numbers = [str(t.counts.get(key, "")) for key in ("passed", "failed", "errors", "skipped")]
        end = "" if t.good else "FAILED" if t.end == "ran" else t.end
        lines.append(f"| {t.file} | {' | '.join(numbers)} | {t.seconds:.0f} | {end} |")
    for t in tests:
        lines += [f"- {t.file}: `{failure}`" for failure in t.failures]
    lines += ["", "## Bench", "", bench, "", "## RULER", "", ruler, ""]
    not_run = ["Metal and Vulkan", "several GPUs"]
    if cpu:
        not_run = ["CUDA: the build, the tests, the bench and RULER", f"tests other than {', '.join(CPU_TESTS)}",
                   *not_run]
    if left_out:
        not_run = [f"for lack of time: {', '.join(left_out)}", *not_run]
    lines += ["## Not run", "", *[f"- {what}" for what in not_run], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
