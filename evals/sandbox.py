"""Runs a program that a model wrote. `python sandbox.py` is the child: it locks itself in, then runs what it is given.

Linux 5.13 or later: namespaces of its own (no network, no other process to see or signal, every mount read-only, a small tmpfs as its
folder), Landlock (no file outside that folder and Python's libraries can be opened), no capabilities, limits of time, memory, file size
and processes (the last not for root, whom Linux exempts). Where the kernel or a container does not permit that, nothing is run, unless
weak=True: limits and an empty folder alone.
"""
import ctypes
import functools
import os
import resource
import secrets
import subprocess
import sys
import tempfile

SECONDS, MEMORY, FILE_SIZE, PROCESSES = 10, 1 << 30, 1 << 20, 8
REFUSED = 77  # exit status: it could not be locked in


@functools.cache
def available() -> bool:
    return sys.platform == "linux" and _child("", weak=False)[0] == 0


def passes(program: str, weak: bool = False) -> bool:
    """Does it run to its end, without an exception, in time? ValueError if it cannot be locked in."""
    if not weak and not available():
        raise ValueError("code of a model is run in namespaces and Landlock, which this system does not permit (Linux 5.13, and in a "
                         "container leave for user namespaces): --unsafe-code runs it with limits of time and memory alone")
    return _child(program, weak) == (0, True)


def _child(program: str, weak: bool) -> tuple[int, bool]:
    """(exit status, did it come to its end)"""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="pykvc-sandbox-") as folder:
        try:
            done = subprocess.run([sys.executable, "-I", "-S", __file__, folder, "weak" if weak else "locked"], input=f"{token}\n{program}".encode(),
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={}, timeout=SECONDS + 2, start_new_session=True)
        except subprocess.TimeoutExpired:
            return -1, False
    return done.returncode, done.stdout.endswith(token.encode())


# -- the child: the standard library only ---------------------------------------------------------------------------------

def _main(folder: str, mode: str) -> None:
    token, _, program = sys.stdin.buffer.read().decode().partition("\n")
    out = os.dup(1)
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    if mode == "locked":
        try:
            _namespaces(folder)
            pid = os.fork()  # the first of its process namespace
            if pid:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xff)
            _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
            _landlock(folder)
            _no_capabilities()
        except OSError:
            os._exit(REFUSED)
    for what, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_CORE, 0),
                        *([(resource.RLIMIT_NPROC, PROCESSES)] if mode == "locked" else [])):  # elsewhere NPROC counts all of the user's
        resource.setrlimit(what, (limit, limit))
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit, too: it did not come to its end
        os._exit(1)
    os.write(out, token.encode())
    os._exit(0)


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
    _call("unshare", 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000)  # CLONE_NEWUSER, NEWNS, NEWNET, NEWPID, NEWIPC
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _call("mount", None, b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # MS_REC | MS_PRIVATE
    read_only = (ctypes.c_uint64*4)(1, 0, 0, 0)  # struct mount_attr, attr_set = MOUNT_ATTR_RDONLY
    _call("syscall", 442, -100, b"/", 0x8000, ctypes.byref(read_only), ctypes.c_size_t(32))  # mount_setattr, AT_RECURSIVE
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(2 | 4), b"size=16m,mode=700")  # MS_NOSUID | MS_NODEV
    os.chdir(folder)


def _landlock(folder: str) -> None:
    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    version = _call("syscall", 444, None, ctypes.c_size_t(0), 1)
    handled = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1  # every access that this kernel knows
    rules = _call("syscall", 444, ctypes.byref(ctypes.c_uint64(handled)), ctypes.c_size_t(8), 0)
    read = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a folder
    for path, allowed in ((folder, handled), *((path, read) for path in {sys.base_prefix, "/usr/lib", "/lib", "/lib64"} if os.path.isdir(path))):
        beneath = Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _call("syscall", 445, rules, 1, ctypes.byref(beneath), 0)
        os.close(beneath.fd)
    _call("syscall", 446, rules, 0)
    os.close(rules)


def _no_capabilities() -> None:
    header, none = (ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)()  # _LINUX_CAPABILITY_VERSION_3, this thread
    _call("capset", ctypes.byref(header), ctypes.byref(none))


if __name__ == "__main__":
    _main(*sys.argv[1:])
