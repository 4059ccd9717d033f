"""Commands in processes of their own, in trouble if a test wants it.

One process imports what is slow and forks for every command, so that these begin at once.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiny_scans
from conftest import make_run, write_cache

ROOT = Path(__file__).parent.parent
SERVER = '''
import ctypes, importlib, json, os, resource, signal, socket, sys, time
import tensorflow, scipy.ndimage, matplotlib.pyplot, pandas
from tf_lesion import methods, restoration, tf1
from tf_lesion.detection import maps
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)


def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def powerless():
    """Even root keeps to the permissions of files, where it has no capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def offline():
    def refused(*given):
        print("NETWORK", given, flush=True)
        raise OSError("there is no network")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
    ctypes.CDLL(None).unshare(0x40000000)  # of the network, where that is allowed


print("ready", flush=True)
for line in sys.stdin:
    name, argv, log, kill_after, trouble = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        try:
            for one in trouble:
                globals()[one]()
            status = sys.modules[name].main(argv)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if kill_after is not None:
        deadline, how = time.monotonic() + kill_after, os.WEXITED | os.WNOWAIT | os.WNOHANG
        while time.monotonic() < deadline and os.waitid(os.P_PID, pid, how) is None:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)  # not waited for yet: the number is still its own
    _, status, used = os.wait4(pid, 0)
    told = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss]
    print(json.dumps(told), flush=True)
'''
COMMANDS = {
    "preprocess": "preprocessing.camcan",
    **{n: f"tf_lesion.cli.{n}" for n in ("train", "calibrate", "evaluate", "detect", "report")},
    "restore": "restore_brats",
    "export": "tf_lesion.cli.export",
    "ship": "tf_lesion.cli.export",
}


class Server:
    """Starts commands, each in a process of its own.

    Attributes:
        seconds, megabytes: that the last one took of processors and, at most, of memory.
    """

    def __init__(self, log):
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(list(COMMANDS.values()))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self):
        return self._process.stdout.readline().strip()

    def run(self, name, argv, *, kill_after=None, trouble=()):
        """Run a command.

        Args:
            name: key of `COMMANDS`.
            argv: what it is given.
            kill_after: seconds to a kill -9, whatever it does then.
            trouble: of "full" (files of 20 kB at most), "powerless" and "offline".

        Returns:
            Its exit status: -9 if it was killed, 70 after a traceback.
        """
        told = [COMMANDS[name], list(map(str, argv)), str(self.log), kill_after, trouble]
        self.log.write_text("")
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        status, self.seconds, kilobytes = json.loads(self._line())
        self.megabytes = kilobytes / 1024
        return status

    def close(self):
        """End it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def said(self):
        """What the last command wrote to the screen."""
        return self.log.read_text(errors="replace")


@dataclass
class Job:
    """A command that is killed.

    Attributes:
        argv: of the first start.
        out: the file or folder that it writes, in a folder of its own.
        again: what a later start is given too, if there is something in a folder.
    """

    name: str
    argv: list
    out: Path
    again: list = field(default_factory=list)

    def at(self, folder):
        """The same job with another output."""
        out = folder / self.out.name
        argv = [out if value == self.out else value for value in self.argv]
        return Job(self.name, argv, out, self.again)

    def next_argv(self):
        """The command line of the next start; None if it made its file, and was killed then."""
        if self.out.is_file():
            return None
        begun = self.out.is_dir() and any(path for path in self.out.glob("[!.]*"))
        return [*self.argv, *(self.again if begun else [])]


def make_jobs(folder, server):
    """{name: `Job`} on inputs that it puts into a folder."""
    values, affine = tiny_scans.brain()
    for number in range(6):
        noise = np.random.default_rng(number).normal(0, 20, values.shape)
        scan = np.where(values > 0, np.maximum(values + noise, 1), 0).astype(np.float32)
        path = folder / "scans" / f"sub-{number}" / "anat" / f"sub-{number}_T2w.nii.gz"
        tiny_scans.write(path, scan, affine)
    cache = write_cache(folder / "cache.h5", train=16, test=24)
    run = make_run(folder / "run", cache, "vae", restoration_steps=40)
    mni = tiny_scans.run(folder / "mni")
    restored = folder / "restored.h5"
    assert server.run("restore", ["--model", run, "--cache", cache, "--out", restored]) == 0

    def job(name, out, argv, *again):
        out = folder / name / out
        return Job(name, [*argv, "--out", out], out, list(again))

    scans = ["--input", folder / "scans", "--voxel-size", tiny_scans.VOXEL_MM, "--align", "none"]
    slices = ["--model", run, "--cache", cache]
    detecting = job("detect", "maps", [])
    detecting.argv = [folder / "scans", detecting.out, "--model", mni, "--align", "center"]
    training = ["--cache", cache, "--model", "vae", "--preset", "practical", "--batch-size", 4]
    training += ["--precision", "float32", "--steps", 60, "--checkpoint-every", 5]
    return {
        "preprocess": job("preprocess", "c.h5", [*scans, "--test-subjects", 2, "--match"]),
        "train": job("train", "run", training, "--resume"),
        "restore": job("restore", "r.h5", [*slices, "--batch-size", 2]),
        "calibrate": job(
            "calibrate",
            "c.h5",
            [*slices, "--batch-size", 4, "--tv-weight", "auto", "--grid", "0.6,1.8,3"],
        ),
        "evaluate": job(
            "evaluate",
            "scores",
            ["--restored", restored, "--cache", cache, "--postprocess", "signed"],
            "--force",
        ),
        "detect": detecting,
        "export": job("export", "saved", ["--model", run]),
        "ship": job("ship", "shipped", ["--model", run, "--as", "run"]),
    }
