"""Cases that run on a fake card: a process of its own takes many of them and says of each what went wrong.

A fake card has to be there before torch is imported (tests/support/fake_card.py), so no test can make one in its own process.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable

from tests.support.places import ROOT

LEFT_BEHIND = ("DS_ACCELERATOR", "LOCAL_RANK")  # by a run with ZeRO on the CPU, in the process of the tests


def faults_of(program: str, *words: str) -> dict[str, str]:
    """Run tests/gpu_path/<program>.py with `words`; return the last lines of the traceback of each case that failed."""
    command = [sys.executable, "-m", f"tests.gpu_path.{program}", *words]
    paths = os.pathsep.join(
        [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "ops"), os.environ.get("PYTHONPATH", "")]
    )
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND} | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = [json.loads(line.removeprefix("case: ")) for line in done.stdout.splitlines() if line.startswith("case: ")]
    assert told, f"{command} took no case"
    return {case: fault for case, fault in told if fault}


def lasting_faults_of(program: str, device: str, *cases: str) -> dict[str, str]:
    """Return the faults of cases that fail in a process with others and in one without those that passed.

    A fake card computes nothing: values are what memory holds, and one case in thousands trips over them.
    """
    faults = faults_of(program, device, *cases)
    lasting = faults and faults_of(program, device, *faults)
    for case, fault in lasting.items():
        print(case, fault, sep="\n")  # whole, where the comparison of a test shows its beginning
    return lasting


def tell_faults(cases: Iterable[str], take: Callable[[str], None]) -> None:
    """Take each case, and print its name and the traceback of the error that it raised, if any."""
    for case in cases:
        fault = ""
        try:
            take(case)
        except Exception as error:
            fault = "".join(traceback.format_exception(error, limit=-8))
        print("case:", json.dumps([case, fault]), flush=True)
