"""Stops one thread, named by its id, until its process or this one is killed."""

import ctypes
import os
import sys

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
libc = ctypes.CDLL(None, use_errno=True)
for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
    if libc.ptrace(request, int(sys.argv[1]), None, None) != 0:
        sys.exit(f"ptrace: errno {ctypes.get_errno()}")
# Who traces a thread has to take note of its end, or the process stays a zombie.
WALL = 0x40000000
while not os.WIFSIGNALED(os.waitpid(int(sys.argv[1]), WALL)[1]):
    pass
