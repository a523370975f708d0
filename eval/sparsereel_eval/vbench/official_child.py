"""Runs in the official program's environment, which has none of our packages: measures one job's dimensions.

Each dimension on its own, so that one that fails (no detectron2, no weights) does not take the others with it.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    import vbench

    output = Path(job["output"])
    info = job["info"] or str(Path(vbench.__file__).parent / "VBench_full_info.json")
    # A device, not its name: with the name, motion smoothness depends on the memory of the GPU.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = {}
    for dimension in job["dimensions"]:
        try:
            program = vbench.VBench(device, info, str(output))
            program.evaluate(
                videos_path=job["videos"],
                name=f"{job['name']}-{dimension}",
                dimension_list=[dimension],
                mode="vbench_standard" if job["info"] else "custom_input",
            )
        except (Exception, SystemExit) as error:
            failed[dimension] = f"{type(error).__name__}: {error}"
    (output / f"{job['name']}_status.json").write_text(json.dumps(failed), encoding="utf-8")


if __name__ == "__main__":
    main()
