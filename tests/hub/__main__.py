"""A loopback Hub as a process: `python -m hub --folder DIR [--port N] [--dataset USER/REPO ...]`, tests/ on PYTHONPATH.

Prints one line of JSON with `endpoint` and `token`, and serves until it is ended.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from hub.server import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dataset", action="append", default=[])
    options = parser.parse_args()
    with serve(options.folder, *options.dataset, port=options.port) as server:
        print(json.dumps({"endpoint": server.endpoint, "token": server.token}), flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
