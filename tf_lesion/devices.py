"""The device that TensorFlow computes on, its precision and its threads.

Every command, and `tf_lesion.load`, calls `start` before TensorFlow is imported: float32 then means
float32, on a GPU memory is taken as it is needed, the user's own Keras settings stay outside, and
the screen of a run that works shows no line of TensorFlow's libraries.
"""

import contextlib
import glob
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lesion.files import InputError

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # 0: everything, also what `start` would leave out
INFO_LEFT_OUT = "1"
THREADS = ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS")
GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows' Linux
# Lines that TensorFlow's C++ writes to file descriptor 2, past Python: "E0000 00:00:17...".
LOGGED = re.compile(
    r"([IWE])\d{4} \d\d:|\d{4}-\d\d-\d\d [\d:.]+: ([IWE]) |(WARNING: All log|To enable the follow)"
)
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")  # of a CPU that multiplies it
HARMLESS = ("Unable to register", "already registered")  # at the import of every GPU build


def start(
    *, device: str = "auto", threads: int | None = None, tf32: bool = False, try_out: bool = True
) -> None:
    """Import TensorFlow and set it up; may be called again.

    Where the program has used TensorFlow before, its device and threads stay as they are.

    Args:
        device: "cpu", "gpu", "gpu:N", or "auto": the GPUs if there are any.
        threads: most processor threads of TensorFlow and ITK; None: all cores.
        tf32: whether GPUs may round the factors of float32 products to 10 bits (TensorFloat-32).
        try_out: run a convolution, so that a GPU that fails is found, and what TensorFlow says of
            its first one is caught. Not where several processes must find each other before.

    Raises:
        InputError: if there is no such device, it cannot be used or not any more, or Keras was
            imported with another backend than TensorFlow.
    """
    if not re.fullmatch(r"auto|cpu|gpu(:\d+)?", device):
        raise InputError(f"Expected a device cpu, gpu, gpu:N or auto, got {device}.")
    _claim_keras()
    if threads is not None:
        os.environ |= dict.fromkeys(THREADS, str(threads))
    loud = os.environ.setdefault(LOG_LEVEL, INFO_LEFT_OUT) == "0"
    lines, keep = [], "IWE"
    try:
        with contextlib.nullcontext() if loud else _captured(lines):
            try:
                _set_up(device, threads, tf32, try_out)
                keep = "WE" if device != "cpu" and _has_gpu() else ""
            except InputError:
                keep = "WE"
                raise
    finally:
        sys.stderr.write("".join(line for line in lines if _matters(line, keep)))


def describe() -> dict[str, Any]:
    """The device, the precision of matrix products and the threads, JSON-serialisable."""
    tf = sys.modules.get("tensorflow")
    gpus = tf.config.get_visible_devices("GPU") if tf else []
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus
    ]
    rounded = gpus and tf.config.experimental.tensor_float_32_execution_enabled()
    threads = tf.config.threading.get_intra_op_parallelism_threads() if tf else 0
    return {
        "name": ", ".join(names) or f"cpu ({platform.machine()})",
        "products": "tf32" if rounded else "float32",
        "threads": threads or os.cpu_count(),
    }


def _claim_keras():
    """Keras works with TensorFlow, whatever the user's keras.json or KERAS_BACKEND says."""
    keras = sys.modules.get("keras")
    if keras is None:
        os.environ["KERAS_BACKEND"] = "tensorflow"
    elif keras.config.backend() != "tensorflow":
        raise InputError(
            f"Expected Keras on TensorFlow, but this program imported it on "
            f"{keras.config.backend()}; set KERAS_BACKEND=tensorflow, or load the prior first."
        )


def _set_up(device, threads, tf32, try_out):
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow is at work already
        if threads is not None:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    if threads is not None and "SimpleITK" in sys.modules:
        sys.modules["SimpleITK"].ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    gpus = tf.config.list_physical_devices("GPU")
    wanted = _wanted(device, gpus) if device != "auto" else tf.config.get_visible_devices("GPU")
    try:
        if wanted != tf.config.get_visible_devices("GPU"):
            tf.config.set_visible_devices(wanted, "GPU")
    except RuntimeError as error:
        raise InputError(f"Expected device {device} before TensorFlow is used: {error}") from error
    for gpu in wanted:
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)
    if try_out:
        kind = "float32" if wanted else "bfloat16"  # oneDNN tells processors that lack it
        try:
            tf.nn.conv2d(tf.zeros([1, 8, 8, 1], kind), tf.zeros([3, 3, 1, 1], kind), 1, "VALID")
        except tf.errors.OpError as error:
            raise InputError(f"The GPU cannot be used ({error.message}); take the cpu.") from error


def _wanted(device, gpus):
    """The GPUs of "cpu", "gpu" or "gpu:N"."""
    number = device.partition(":")[2]
    if device == "cpu":
        return []
    if not gpus or int(number or 0) >= len(gpus):
        there = ", ".join(["cpu", *(f"gpu:{index}" for index in range(len(gpus)))])
        hint = "" if gpus else "; TensorFlow finds no GPU that it can use"
        raise InputError(f"Expected a device that is there, got {device}; there is {there}{hint}.")
    return [gpus[int(number)]] if number else gpus


def _has_gpu():
    """Whether this machine has a GPU that the user has not hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(glob.glob(pattern) for pattern in GPU_FILES)


def _matters(line, levels):
    """Whether to show a line: not of TensorFlow's C++, or of one of the levels I, W, E."""
    logged = LOGGED.match(line)
    if logged is None or levels == "IWE":
        return True
    level = logged[1] or logged[2] or "I"
    return level in levels and not any(text in line for text in HARMLESS)


@contextlib.contextmanager
def _captured(lines: list[str]) -> Iterator[None]:
    """Append to `lines` what is written to file descriptor 2 meanwhile."""
    try:
        real = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            caught.seek(0)
            lines += caught.read().decode(errors="replace").splitlines(keepends=True)


def slow_in_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this computer is known to emulate bfloat16: no GPU, and a CPU without its products.

    A step of training took six times as long on such a CPU as in float32.
    """
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU") or not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text(encoding="utf-8")
    return "flags" in flags and not any(name in flags for name in BFLOAT16_FLAGS)
