"""The first process of a machine of the cluster: covers what is the host's, then reaps processes.

usage: machine_init.py [SOURCE:TARGET]...

Runs as process 1 of new mount, network and process namespaces (see machine.py). Everything of the machine ends
with it. Each TARGET becomes a directory of the machine alone, kept in SOURCE.
"""

import os
import pathlib
import signal
import subprocess
import sys

# Where Kubernetes, containerd and pods keep what is theirs. Whatever they make there ends with the machine.
PRIVATE = ["/run", "/var/lib", "/var/log"]
# What kubelet sets for the whole host. It gets files to write to instead.
SYSCTLS = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"]


def mount(*words) -> None:
    subprocess.run(["mount", *words], check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    # Before anything can end: from here on a child's end waits until it is asked for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # Kubelet and containers share mounts both ways; with the host there is nothing to share any more.
    mount("--make-rshared", "/")
    for path in PRIVATE:
        mount("-t", "tmpfs", "-o", "mode=755", "clip-e2e", path)
    for pair in sys.argv[1:]:
        source, target = pair.split(":")
        os.makedirs(source, exist_ok=True)
        os.makedirs(target, exist_ok=True)
        mount("--bind", source, target)
    for number, name in enumerate(SYSCTLS):
        real, copy = pathlib.Path("/proc/sys", name), pathlib.Path(f"/run/sysctl-{number}")
        if real.exists():
            copy.write_text(real.read_text())
            mount("--bind", copy, real)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("ready", flush=True)
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    main()
