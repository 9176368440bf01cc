"""The peak memory of code in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def peak() -> int:
    """The peak resident memory of this process in bytes.

    Of getrusage, Linux starts a new program with the peak of the process that started it: in a child of pytest that is
    the memory of the tests before.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def numbers_of(code: str) -> list[float]:
    """What a program prints that may call `peak`, as numbers."""
    own = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = "from peak_memory import peak\n" + code
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": own})  # fmt: skip
    return [float(word) for word in out.stdout.split()]
