"""Reads a process's seccomp filters from the kernel and says what they do with a system call.

By PTRACE_SECCOMP_GET_FILTER (Linux 4.4, CAP_SYS_ADMIN), which gives the classic BPF programs as they
were installed. All filters run on each call, and the strictest answer counts (seccomp(2)).
"""

import ctypes
import errno
import os
import platform
import struct

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, PTRACE_SECCOMP_GET_FILTER = 0x4206, 0x4207, 17, 0x420C
WALL = 0x40000000

ALLOW, KILL_PROCESS, KILL_THREAD, TRAP, ERRNO = 0x7FFF0000, 0x80000000, 0, 0x00030000, 0x00050000
ACTION, DATA = 0xFFFF0000, 0xFFFF
NAMES = {ALLOW: "allow", KILL_PROCESS: "kill process", KILL_THREAD: "kill thread", TRAP: "trap", ERRNO: "errno"}

# Architecture as seccomp names it, and the system calls that are asked about.
AUDIT_ARCH, NUMBERS = {
    "x86_64": (0xC000003E, {"read": 0, "socket": 41, "connect": 42, "sendto": 44, "bind": 49, "ptrace": 101, "mount": 165, "openat": 257, "io_uring_setup": 425}),
    "aarch64": (0xC00000B7, {"read": 63, "socket": 198, "connect": 203, "sendto": 206, "bind": 200, "ptrace": 117, "mount": 40, "openat": 56, "io_uring_setup": 425}),
}[platform.machine()]

# i386 and ARM's 32 bits: what a process of such a machine may call, too.
OTHER_ARCHES = {"x86_64": (0x40000003,), "aarch64": (0x40000028,)}[platform.machine()]

Program = list[tuple[int, int, int, int]]


def filters(pid: int) -> list[Program]:
    """The filters of a process's main thread; it is stopped for the moment that takes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long

    def ptrace(request: int, address: int, data) -> int:
        done = libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data)
        if done < 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of {pid}: {os.strerror(ctypes.get_errno())}")
        return done

    ptrace(PTRACE_SEIZE, 0, None)
    try:
        ptrace(PTRACE_INTERRUPT, 0, None)
        os.waitpid(pid, WALL)
        found: list[Program] = []
        while True:
            try:
                length = ptrace(PTRACE_SECCOMP_GET_FILTER, len(found), None)
            except OSError as error:
                # EINVAL: it has none at all.
                if error.errno in (errno.ENOENT, errno.EINVAL):
                    return found
                raise
            raw = ctypes.create_string_buffer(8 * length)
            ptrace(PTRACE_SECCOMP_GET_FILTER, len(found), raw)
            found.append(list(struct.iter_unpack("=HBBI", raw.raw)))
    finally:
        ptrace(PTRACE_DETACH, 0, ctypes.c_void_p(0))


def verdict(programs: list[Program], call: str, *arguments: int, arch: int = AUDIT_ARCH) -> tuple[str, int]:
    """What happens to a call: an action of NAMES, and its data (the errno)."""
    data = struct.pack("=iIQ6Q", NUMBERS[call], arch, 0, *(list(arguments) + [0] * 6)[:6])
    answers = [run(program, data) for program in programs] or [ALLOW]
    # The action is compared as a signed number: the least is the strictest.
    strictest = min(answers, key=lambda it: struct.unpack("=i", struct.pack("=I", it & ACTION))[0])
    return NAMES.get(strictest & ACTION, hex(strictest & ACTION)), strictest & DATA


def run(program: Program, data: bytes) -> int:
    """A classic BPF program on a seccomp_data; what seccomp lets in and no more (kernel/seccomp.c, seccomp_check_filter)."""
    a = x = at = 0
    memory = [0] * 16
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        kind, mode, operand = code & 7, code & 0xE0, x if code & 8 else k
        if kind == 0:
            a = {0x20: lambda: struct.unpack_from("=I", data, k)[0], 0x00: lambda: k, 0x60: lambda: memory[k], 0x80: lambda: len(data)}[mode]()
        elif kind == 1:
            x = {0x00: lambda: k, 0x60: lambda: memory[k], 0x80: lambda: len(data)}[mode]()
        elif kind == 2:
            memory[k] = a
        elif kind == 3:
            memory[k] = x
        elif kind == 4:
            operation = code & 0xF0
            a = {0x00: a + operand, 0x10: a - operand, 0x20: a * operand, 0x30: a // operand if operand else 0, 0x40: a | operand, 0x50: a & operand,
                 0x60: a << operand if operand < 32 else 0, 0x70: a >> operand, 0x80: -a, 0xA0: a ^ operand}[operation] & 0xFFFFFFFF
        elif kind == 5:
            operation = code & 0xF0
            if operation == 0:
                at += k
            else:
                holds = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}[operation]
                at += jump_true if holds else jump_false
        elif kind == 6:
            return a if code & 0x18 == 0x10 else k
        else:
            x, a = (a, a) if code & 0xF8 == 0 else (x, x)
