"""`python -m tests.trt_bindings` installs the bindings of every version; `--write` describes them in JSON anew."""

from __future__ import annotations

import sys

from .stubs import Unavailable
from .surface import VERSIONS, write
from .venvs import make


def main(arguments: list[str]) -> int:
    failed = 0
    for version in VERSIONS:
        try:
            environment = make(version, print)
        except Unavailable as error:
            print(f"TensorRT {version}: {error}")
            failed = 1
            continue
        print(f"TensorRT {version}: {environment.python}")
        if arguments == ["--write"]:
            print(write(version, environment.json("-m", "trt_bindings.dump_surface")))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
