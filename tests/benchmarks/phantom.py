"""Time to draw the phantom.  python tests/benchmarks/phantom.py

Draws 5,000 images at 32x32 on one thread and prints seconds, as JSON on the last line. About 10 s on one core.
"""

import argparse
import json
import time

import torch
from threadpoolctl import threadpool_limits

from pathalign import phantom


def main() -> None:
    """Parse the size, draw once to warm up, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--image-size-px", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    phantom.draw(2, options.image_size_px)
    wall, processor = time.perf_counter(), time.process_time()
    drawn = phantom.draw(options.per_class, options.image_size_px)
    result = {
        "images": len(drawn),
        "image_size_px": options.image_size_px,
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - processor, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
