"""Runs a program that a model wrote, and tests of it. `python sandbox.py` is the child: it locks itself in, then runs
what it is given.

With bubblewrap (`bwrap`), where that is installed and may run: namespaces of its own (no network, no other process to
see or signal), and in its file system nothing but Python, the system's libraries and an empty folder. Else by Linux
5.13 or later itself: the same namespaces, every mount read-only, a small tmpfs as its folder, and Landlock (no other
file can be opened, and no program be started). Both: no capabilities, limits of time, memory, file size and processes
(the last not for root, whom Linux exempts). Where the kernel or a container permits neither, nothing is run, unless
weak=True: limits and an empty folder alone.

The tests are in a process of their own, which the program can neither see nor trace (root can, if weak): it gets the
arguments of a call and gives a value, and that value is all it has a say in.
"""
import builtins
import contextlib
import ctypes
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import astuple, dataclass
from typing import Any, TextIO

SECONDS, MEMORY, FILE_SIZE, PROCESSES = 10, 1 << 30, 1 << 20, 8
REFUSED = 77  # exit status: it could not be locked in
WAYS = "bubblewrap", "locked"


@dataclass(frozen=True)
class Tests:
    """What judges a function: `check` defines check(candidate), and may use what `setup` defines."""
    setup: str
    check: str
    function: str  # its name in the program


@functools.cache
def way() -> str:
    """How a program can be locked in here: "bubblewrap", "locked" (the kernel alone), or "" if it cannot be."""
    return next((one for one in WAYS if sys.platform == "linux" and _child("", None, one) == 0), "")


def available() -> bool:
    return way() != ""


def passes(program: str, tests: Tests | None = None, weak: bool = False) -> bool:
    """Does it run to its end, without an exception, in time, and does its function pass the tests?

    It is run in an empty namespace, so `__name__` is not "__main__". Arguments and values of the function are None,
    bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, or a subclass of one, which arrives as
    that one. An argument that the function changes stays as it was for the tests. ValueError: cannot be locked in."""
    if not weak and not available():
        raise ValueError("code of a model is run in namespaces and Landlock, which this system does not permit (Linux "
                         "5.13, and in a container leave for user namespaces): --unsafe-code runs it with limits of "
                         "time and memory alone")
    return _child(program, tests, "weak" if weak else way()) == 0


def _child(program: str, tests: Tests | None, how: str) -> int:
    """Exit status: 0 if it passes."""
    if how == "bubblewrap" and not shutil.which("bwrap"):
        return REFUSED
    job = json.dumps(program) + "\n" + json.dumps(tests and astuple(tests))
    with tempfile.TemporaryDirectory(prefix="pykvc-sandbox-") as folder:
        python, script, within = sys.executable, os.path.realpath(__file__), folder
        if how == "bubblewrap":
            python, script, within = os.path.realpath(python), "/sandbox.py", "/tmp"
        command = [*(_bubblewrap(python) if how == "bubblewrap" else []), python, "-I", "-S", script, within, how]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              cwd=folder, env={}, start_new_session=True) as child:
            try:
                child.communicate(job.encode(), timeout=SECONDS + 2)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
        if how == "weak":  # what a program left behind; namespaces end with their first process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode


def readable() -> list[str]:
    """The folders of Python's own modules and of shared libraries, Python's and the system's: never all of the prefix,
    which is /usr for a distribution's Python."""
    paths = {sysconfig.get_path("stdlib"), *(os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)),
             "/usr/lib", "/usr/lib64", "/lib", "/lib64"}
    return sorted(path for path in paths if os.path.isdir(path))


def _bubblewrap(python: str) -> list[str]:
    """The command in front of a command."""
    shown = {path: path for path in (*readable(), python)} | {os.path.realpath(__file__): "/sandbox.py"}
    return [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
            "--cap-drop", "ALL", "--dev", "/dev", "--size", str(16 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp",
            *(word for path, at in shown.items() for word in ("--ro-bind", path, at))]


# -- the child: the standard library only ---------------------------------------------------------------------------

def _main(folder: str, how: str) -> None:
    stdin = open(0, "rb", buffering=0)  # the program's process begins as a copy of this one, before the tests are read
    program = json.loads(stdin.readline())
    null = os.open(os.devnull, os.O_RDWR)
    if how == "locked":
        try:
            _namespaces(folder)
            pid = os.fork()  # the first of its process namespace
            if pid:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xff)
            _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
            _landlock(folder)
            header, none = (ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)()  # version 3, this thread
            _call("capset", ctypes.byref(header), ctypes.byref(none))
        except OSError:
            os._exit(REFUSED)
    for what, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY),
                        (resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_CORE, 0),
                        *([] if how == "weak" else [(resource.RLIMIT_NPROC, PROCESSES)])):  # there the user's count
        resource.setrlimit(what, (limit, limit))
    if sys.platform == "linux":
        _prctl(4, 0)  # PR_SET_DUMPABLE: no process of this user may trace it or read its memory
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        os.dup2(null, 0)
        _serve(program, theirs.makefile("rw"))
        os._exit(0)
    theirs.close()
    os._exit(_judge(json.loads(stdin.read()), ours.makefile("rw")))


def _serve(program: str, calls: TextIO) -> None:
    """The program's process: calls of its function, a line each, "name" and arguments."""
    names: dict[str, Any] = {}
    try:
        exec(compile(program, "program", "exec"), names)
        print(file=calls, flush=True)
        for call in calls:
            name, args, more = json.loads(call, object_hook=_unpacked)
            try:
                said = _packed(("value", names[name](*args, **more)))
            except Exception as error:
                said = _packed(("error", type(error).__name__, str(error)))
            print(json.dumps(said), file=calls, flush=True)
    except BaseException:  # SystemExit, too: it did not come to its end
        os._exit(1)


def _judge(tests: list[str] | None, calls: TextIO) -> int:
    """The tests' process: an exit status."""
    if not calls.readline():
        return 1
    if tests is None:
        return 0
    setup, check, function = tests

    def candidate(*args: Any, **more: Any) -> Any:
        print(json.dumps(_packed((function, args, more))), file=calls, flush=True)
        kind, *said = json.loads(calls.readline(), object_hook=_unpacked)
        if kind == "value":
            return said[0]
        found = getattr(builtins, said[0], None)
        takes_a_text = isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError)
        raise (found if takes_a_text else Exception)(said[1])

    names: dict[str, Any] = {}
    try:
        exec(compile(setup, "setup", "exec"), names)
        names[function] = candidate
        exec(compile(check, "tests", "exec"), names)
        names["check"](candidate)
    except BaseException:
        return 1
    return 0


KINDS = {"complex": lambda parts: complex(*parts),
         **{kind.__name__: kind for kind in (list, tuple, set, frozenset, bytes, dict)}}


def _packed(value: Any) -> Any:
    """As JSON, where an object is a kind and its parts. TypeError: it is of another type than those of passes()."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain.__new__(plain, value)
    for many in (list, tuple, set, frozenset, bytes):
        if isinstance(value, many):
            return {many.__name__: [_packed(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(one)] for key, one in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} does not leave the sandbox")


def _unpacked(packed: dict[str, Any]) -> Any:
    """Of an object, whose parts are unpacked already."""
    [(kind, parts)] = packed.items()
    return KINDS[kind](parts)


def _call(function: str, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, function)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), function)
    return result


def _prctl(option: int, value: int) -> None:
    _call("prctl", *map(ctypes.c_ulong, (option, value, 0, 0, 0)))


def _namespaces(folder: str) -> None:
    uid, gid = os.getuid(), os.getgid()
    # CLONE_NEWUSER, NEWNS, NEWNET, NEWPID, NEWIPC
    _call("unshare", 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _call("mount", None, b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # MS_REC | MS_PRIVATE
    read_only = (ctypes.c_uint64*4)(1, 0, 0, 0)  # struct mount_attr, attr_set = MOUNT_ATTR_RDONLY
    # mount_setattr, AT_RECURSIVE
    _call("syscall", 442, -100, b"/", 0x8000, ctypes.byref(read_only), ctypes.c_size_t(32))
    # MS_NOSUID | MS_NODEV
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(2 | 4), b"size=16m,mode=700")
    os.chdir(folder)


def _landlock(folder: str) -> None:
    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    version = _call("syscall", 444, None, ctypes.c_size_t(0), 1)
    handled = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1  # every access that this kernel knows
    rules = _call("syscall", 444, ctypes.byref(ctypes.c_uint64(handled)), ctypes.c_size_t(8), 0)
    read = 1 << 2 | 1 << 3  # a file, a folder; nothing is executed
    for path, allowed in ((folder, handled & ~1), *((path, read) for path in readable())):
        beneath = Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _call("syscall", 445, rules, 1, ctypes.byref(beneath), 0)
        os.close(beneath.fd)
    _call("syscall", 446, rules, 0)
    os.close(rules)


if __name__ == "__main__":
    _main(*sys.argv[1:])
